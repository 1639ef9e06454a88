"""The pipeline's model over a stand-in for Triton's Python API, whose server runs the bundle's own sessions."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.triton_server.repository import Choices, version_of, write_repository

SMALL = {"height": 64, "width": 64, "num_inference_steps": 2}


class FakeTensor:
    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._array


class FakeResponse:
    def __init__(self, output_tensors: list[FakeTensor], error: Any = None) -> None:
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[FakeTensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Any:
        return self._error


class FakeError:
    INVALID_ARG, INTERNAL, CANCELLED = "invalid", "internal", "cancelled"

    def __init__(self, message: str, code: str) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class FakeServer:
    """Runs the stages of a pipeline under the names that the repository gives them."""

    def __init__(self, pipeline: Pipeline, version: int) -> None:
        self._pipeline, self._version = pipeline, version
        self.runs: list[tuple[str, int]] = []
        self.broken = ""

    def request(self, **asked: Any) -> SimpleNamespace:
        return SimpleNamespace(exec=lambda: self._exec(**asked))

    def _exec(
        self,
        model_name: str,
        model_version: int,
        requested_output_names: list[str],
        inputs: list[FakeTensor],
        **_: Any,
    ) -> FakeResponse:
        assert model_version == self._version
        stage = model_name.removeprefix("tiny_")
        self.runs.append((stage, inputs[0].as_numpy().shape[0]))
        if stage == self.broken:
            return FakeResponse([], FakeError("the device was lost", FakeError.INTERNAL))
        outputs = self._pipeline.sessions[stage].run({each.name(): each.as_numpy() for each in inputs})
        return FakeResponse([FakeTensor(name, outputs[name]) for name in requested_output_names])


class FakeRequest:
    def __init__(self, cancelled: bool = False, **given: Any) -> None:
        self.tensors = {name: FakeTensor(name, array) for name, array in given.items()}
        self.is_cancelled = lambda: cancelled


def ask(prompt: str = "red cat", *, cancelled: bool = False, **given: Any) -> FakeRequest:
    arrays = {"prompt": np.array([[prompt.encode()]], object)}
    for name, value in {**SMALL, **given}.items():
        value = value.encode() if isinstance(value, str) else value
        arrays[name] = np.array([[value]], object if isinstance(value, bytes) else None)
    return FakeRequest(cancelled, **arrays)


@pytest.fixture
def server(
    tiny_bundle: Path, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FakeServer, Any]]:
    version = version_of(load_manifest(tiny_bundle))
    fake = FakeServer(pipeline, version)
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = FakeTensor, FakeResponse, FakeError
    module.InferenceRequest = fake.request
    module.PreferredMemory, module.TRITONSERVER_MEMORY_CPU = (lambda kind, number: None), 0
    module.get_input_tensor_by_name = lambda request, name: request.tensors.get(name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    monkeypatch.delitem(sys.modules, "ditc.runtime.triton_server.model", raising=False)
    write_repository(tiny_bundle, tmp_path / "repository", Choices(name="tiny"))
    model = importlib.import_module("ditc.runtime.triton_server.model").TritonPythonModel()
    stages = {
        stage: {
            "model": f"tiny_{stage}",
            "key": load_manifest(tiny_bundle).stages[stage].artifacts[0].key,
        }
        for stage in pipeline.sessions
        if stage != "vae_encoder"
    }
    config = {"parameters": {"stages": {"string_value": json.dumps(stages)}}}
    model.initialize(
        {
            "model_config": json.dumps(config),
            "model_version": str(version),
            "model_repository": str(tmp_path / "repository" / "tiny"),
        }
    )
    yield fake, model
    model.finalize()
    sys.modules.pop("ditc.runtime.triton_server.model", None)


def drawn(response: FakeResponse) -> dict[str, np.ndarray[Any, Any]]:
    assert not response.has_error(), response.error().message()
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


def test_requests_that_come_together_share_runs_and_are_those_of_pipeline(
    server: tuple[FakeServer, Any], pipeline: Pipeline
) -> None:
    fake, model = server
    given = [
        {"seed": 1},
        {"prompt": "blue dog", "seed": 2, "negative_prompt": "cat", "guidance_scale": 3.3},
        {"seed": 3, "num_inference_steps": 3, "guidance_scale": 1.0},
        {"seed": 4, "width": 96},
        {"seed": 5},
    ]
    answers = model.execute([ask(**each) for each in given])
    assert max(size for stage, size in fake.runs if stage == "denoiser") > 1
    for each, answer in zip(given, answers, strict=True):
        found = drawn(answer)
        alone = pipeline.draw(Request(**{"prompt": "red cat", **SMALL, **each})).images[0]
        assert np.array_equal(found["image"][0], np.asarray(alone)) and found["image"].dtype == np.uint8
        assert found["seed"].tolist() == [[each["seed"]]]


def test_a_request_without_a_seed_is_told_the_one_that_was_taken(
    server: tuple[FakeServer, Any], pipeline: Pipeline
) -> None:
    found = drawn(server[1].execute([ask()])[0])
    alone = pipeline.draw(Request(prompt="red cat", seed=int(found["seed"][0, 0]), **SMALL)).images[0]
    assert np.array_equal(found["image"][0], np.asarray(alone))


def test_a_request_that_is_wrong_or_cancelled_ends_alone(server: tuple[FakeServer, Any]) -> None:
    two = FakeRequest(prompt=np.array([[b"a"], [b"b"]], object))
    no_text = FakeRequest(prompt=np.array([[b"\xff"]], object))
    answers = server[1].execute([ask(seed=1), ask(height=63), two, no_text, ask(cancelled=True)])
    drawn(answers[0])
    for answer, message, code in (
        (answers[1], "height 63", FakeError.INVALID_ARG),
        (answers[2], "prompt has 2 values", FakeError.INVALID_ARG),
        (answers[3], "prompt is not UTF-8", FakeError.INVALID_ARG),
        (answers[4], "cancelled", FakeError.CANCELLED),
    ):
        assert message in answer.error().message() and answer.error().code == code


@pytest.mark.parametrize("stage", ["text_encoder", "denoiser", "vae_decoder"])
def test_a_stage_that_fails_ends_the_requests_and_the_model_goes_on(
    server: tuple[FakeServer, Any], stage: str
) -> None:
    fake, model = server
    fake.broken = stage
    for answer in model.execute(
        [ask(f"never asked before {stage}", seed=1), ask(f"nor this {stage}", seed=2)]
    ):
        assert "the device was lost" in answer.error().message() and answer.error().code == FakeError.INTERNAL
    fake.broken = ""
    drawn(model.execute([ask(seed=1)])[0])


def test_a_repository_of_another_bundle_is_refused(server: tuple[FakeServer, Any], tiny_bundle: Path) -> None:
    from ditc.runtime.errors import BundleError
    from ditc.runtime.triton_server.model import open_pipeline

    with pytest.raises(BundleError, match="the manifest has no denoiser with the key"):
        open_pipeline(tiny_bundle, {"denoiser": {"model": "x", "key": "other"}}, 1)
