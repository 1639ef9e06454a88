"""IO binding with the CPU's memory: the code of the CUDA session, run on the CPU provider."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from ditc.runtime import denoise
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import SessionError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import to_numpy
from ditc.runtime.sessions.onnxruntime_device import MAX_GRAPHS, OnnxRuntimeDeviceSession, OrtTensor
from ditc.runtime.spec import DENOISER, DType, Range, StageSpec, TensorSpec

SETTINGS: dict[str, Any] = {"num_inference_steps": 4, "height": 64, "width": 64, "seed": 3}


def bound(bundle: Path, *, graphs: bool) -> OnnxRuntimeDeviceSession:
    artifact = load_manifest(bundle).stages[DENOISER].artifacts[0]
    path = bundle / artifact.file.path
    return OnnxRuntimeDeviceSession(path, artifact.spec, device="cpu", threads=1, graphs=graphs)


@pytest.mark.parametrize("graphs", [False, True])
def test_every_state_is_that_of_the_plain_session(
    tiny_bundle: Path, pipeline: Pipeline, graphs: bool
) -> None:
    session = bound(tiny_bundle, graphs=graphs)
    for seed in (3, 4):
        (state,) = pipeline.start(pipeline.plan(Request(prompt="red cat", **{**SETTINGS, "seed": seed})))
        other, kept = state, []
        while not state.done:
            (state,) = denoise.step(session, [state])
            (other,) = denoise.step(pipeline.sessions[DENOISER], [other])
            assert isinstance(state.latents, OrtTensor)
            kept.append((state, other))
        for mine, plain in kept:  # nothing has overwritten the results of earlier steps
            for name in ("latents", "history", "x0", "stats"):
                assert np.array_equal(to_numpy(getattr(mine, name)), to_numpy(getattr(plain, name))), name
    session.close()


def test_the_number_of_graphs_is_bounded_and_further_shapes_run_without(
    tiny_bundle: Path, pipeline: Pipeline
) -> None:
    session = bound(tiny_bundle, graphs=True)
    for width in range(32, 32 + 4 * (MAX_GRAPHS + 2), 4):
        plan = pipeline.plan(Request(prompt="red cat", **{**SETTINGS, "width": width}))
        (state,) = pipeline.start(plan)
        for _ in range(2):
            (result,) = denoise.step(session, [state])
        (expected,) = denoise.step(pipeline.sessions[DENOISER], [state])
        assert np.array_equal(to_numpy(result.latents), to_numpy(expected.latents))
    assert len(session._graphs) == MAX_GRAPHS
    session.close()


def test_a_wrong_shape_is_a_session_error(tiny_bundle: Path, pipeline: Pipeline) -> None:
    session = bound(tiny_bundle, graphs=False)
    (state,) = pipeline.start(pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    with pytest.raises(SessionError, match="denoiser: "):
        denoise.step(session, [replace(state, latents=np.zeros((1, 3, 8, 8), np.float32))])
    session.close()


def test_bf16_goes_in_and_comes_back_as_its_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy() of ONNX Runtime does not support bf16, and its sessions do not take a uint16 array for a bf16 input."""
    # Stages in bf16 are refused on a CPU, because the provider has no kernels but those that copy.
    monkeypatch.setattr("ditc.runtime.sessions.onnxruntime._has_bf16", lambda *_: False)
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (bfloat16[n] x) => (bfloat16[n] y) { y = Identity(x) }'
    )
    onnx.save(graph, tmp_path / "g.onnx")
    x, y = (TensorSpec(name, DType.BFLOAT16, ("n",)) for name in "xy")
    spec = StageSpec(name="g", inputs=(x,), outputs=(y,), profile={"n": Range(1, 4, 8)})
    bits = np.array([0x3F80, 0xC000, 0x7F80, 0x0001], np.uint16)  # 1, -2, infinity, the smallest subnormal
    with closing(OnnxRuntimeDeviceSession(tmp_path / "g.onnx", spec, device="cpu", threads=1)) as session:
        result = session.run({"x": bits})["y"]
        assert isinstance(result, OrtTensor)
        np.testing.assert_array_equal(result.numpy(), bits)
        np.testing.assert_array_equal(to_numpy(session.run({"x": result})["y"]), bits)


def test_every_run_waits_for_the_copies_into_its_inputs(
    tiny_bundle: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for owner, name in ((ort.IOBinding, "synchronize_inputs"), (ort.OrtValue, "update_inplace")):
        monkeypatch.setattr(owner, name, noted(calls, name, getattr(owner, name)))
    monkeypatch.setattr(
        ort.InferenceSession,
        "run_with_iobinding",
        noted(calls, "run", ort.InferenceSession.run_with_iobinding),
    )
    with closing(bound(tiny_bundle, graphs=True)) as session:
        (state,) = pipeline.start(pipeline.plan(Request(prompt="red cat", **SETTINGS)))
        while not state.done:
            (state,) = denoise.step(session, [state])
    runs = [index for index, name in enumerate(calls) if name == "run"]
    assert len(runs) == SETTINGS["num_inference_steps"] and "update_inplace" in calls
    assert {calls[index - 1] for index in runs} == {"synchronize_inputs"}


def noted(calls: list[str], name: str, function: Any) -> Any:
    def call(*arguments: Any) -> Any:
        calls.append(name)
        return function(*arguments)

    return call
