"""The pipeline as a model of Triton's Python backend: it calls the stages, which are models of the same server (BLS).

Requests that Triton hands over together share runs of the denoiser, like those of `ditc serve`. Only this process and
the stages' own libraries compute; PyTorch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import Artifact, Manifest, load_manifest
from ditc.runtime.conditioning import Conditioning
from ditc.runtime.errors import BundleError, DitcError, SessionError
from ditc.runtime.guard import Guard
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.scheduling.batches import Batches
from ditc.runtime.serving.scheduling.job import batch_key
from ditc.runtime.serving.scheduling.policy import BatchKey
from ditc.runtime.session import ComputeDevice, Tensor, to_numpy
from ditc.runtime.spec import CONDITIONER, DENOISER, StageSpec
from ditc.runtime.state import DenoiseState
from ditc.runtime.step_contract import BATCH, ROWS
from ditc.runtime.text import Tokenizer
from ditc.runtime.text_encoder import TextEncoder
from ditc.runtime.triton_server.fields import IMAGE, INPUTS, SEED, read_request
from ditc.runtime.triton_server.repository import BUNDLE, STAGES


class ServerSession:
    """Runs a stage as a model of the server that this process belongs to.

    Args:
        model: its name.
        version: its version.
    """

    def __init__(self, spec: StageSpec, model: str, version: int) -> None:
        self.spec, self._model, self._version = spec, model, version
        self.device = ComputeDevice(kind="other", name=f"Triton's model {model}")

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the stage once. Raises SessionError if the server refuses the request."""
        request = pb_utils.InferenceRequest(
            model_name=self._model,
            model_version=self._version,
            requested_output_names=[tensor.name for tensor in self.spec.outputs],
            inputs=[
                pb_utils.Tensor(tensor.name, np.ascontiguousarray(to_numpy(feeds[tensor.name])))
                for tensor in self.spec.inputs
            ],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise SessionError(
                f"{self.spec.name}: {response.error().message()}",
                hint=f"see the server's log of {self._model}",
            )
        # Copied, because the memory of a response belongs to the server.
        return {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}

    def close(self) -> None:
        """The server ends its models itself."""


@dataclass(eq=False, kw_only=True)
class _Picture:
    """One request that is drawn."""

    index: int
    request: Any
    plan: Plan
    state: DenoiseState
    guard: Guard = field(default_factory=lambda: Guard(DENOISER))


class TritonPythonModel:
    """What Triton's Python backend creates, one per instance. Its methods' names and forms are Triton's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the manifest and the tokenizers, and connect the stages."""
        config = json.loads(args["model_config"])
        stages = json.loads(config["parameters"][STAGES]["string_value"])
        version = int(args["model_version"])
        bundle = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        self._pipeline = open_pipeline(bundle, stages, version)
        denoiser = self._pipeline.sessions[DENOISER]
        self._batches, self._spec = Batches(denoiser), denoiser.spec

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Draw the requests together. Each gets its picture or its own error."""
        answers: list[Any] = [None] * len(requests)
        pictures: list[_Picture] = []
        for index, request in enumerate(requests):
            try:
                given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS}
                asked = read_request(
                    {n: tensor.as_numpy() for n, tensor in given.items() if tensor is not None}
                )
                plan = replace(self._pipeline.plan(asked), at_once=1)
                (state,) = self._pipeline.states(plan)
                pictures.append(_Picture(index=index, request=request, plan=plan, state=state))
            except DitcError as error:
                answers[index] = _refused(error)
        active = list(pictures)
        while active := [
            p for p in active if answers[p.index] is None and not (p.state.done or p.state.lost)
        ]:
            self._step(active, answers)
        self._batches.keep(())
        for picture in pictures:
            if answers[picture.index] is None:
                answers[picture.index] = self._finished(picture)
        return answers

    def finalize(self) -> None:
        """Nothing is open that the server does not close."""
        self._pipeline.close()

    def _step(self, active: Sequence[_Picture], answers: list[Any]) -> None:
        """One run of the denoiser, for the first picture and those that can join it."""
        key = batch_key(active[0].state)
        group = [picture for picture in active if batch_key(picture.state) == key][: self._most(key)]
        for picture in group:
            if picture.request.is_cancelled():
                answers[picture.index] = _error("the request was cancelled", pb_utils.TritonError.CANCELLED)
        group = [picture for picture in group if answers[picture.index] is None]
        if not group:
            return
        try:
            states = self._batches.step(key, [picture.state for picture in group])
        except DitcError as error:
            for picture in group:
                answers[picture.index] = _refused(error)
            return
        for picture, state in zip(group, states, strict=True):
            picture.state = picture.guard.watch(state)

    def _most(self, key: BatchKey) -> int:
        """How many pictures a run can hold."""
        rows = self._spec.profile[ROWS].max // key.rows if ROWS in self._spec.profile else MOST
        return max(1, min(self._spec.profile[BATCH].max, rows))

    def _finished(self, picture: _Picture) -> Any:
        try:
            decoded = self._pipeline.decode_state(picture.state, picture.plan)
        except DitcError as error:
            return _refused(error)
        if decoded.failures:
            return _error(decoded.failures[0].reason, pb_utils.TritonError.INTERNAL)
        image = np.asarray(decoded.pictures[0].convert("RGB"), np.uint8)[None]
        seed = np.array([[picture.plan.seed]], np.int64)
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor(IMAGE, image), pb_utils.Tensor(SEED, seed)]
        )


# More pictures than any denoiser takes.
MOST = 2**16


def open_pipeline(bundle: Path, stages: Mapping[str, Mapping[str, str]], version: int) -> Pipeline:
    """The pipeline over the server's models.

    Args:
        bundle: a folder with the manifest and the tokenizers.
        stages: by stage, the name of its model and the key of its artifact.

    Raises:
        BundleError: the folder is damaged, or does not belong to the stages.
    """
    manifest = load_manifest(bundle)
    tokenizers = {spec.tokenizer for spec in manifest.text}
    check_files(bundle, [ref for ref in manifest.files if ref.path in tokenizers])
    sessions = {
        stage: ServerSession(_artifact(manifest, stage, about["key"]).spec, about["model"], version)
        for stage, about in stages.items()
    }
    encoders = [
        TextEncoder(spec, Tokenizer(bundle / spec.tokenizer), sessions[spec.stage]) for spec in manifest.text
    ]
    key = "+".join(stages[name]["key"] for name in (CONDITIONER, *(spec.stage for spec in manifest.text)))
    return Pipeline(manifest, sessions, Conditioning(encoders, sessions[CONDITIONER], key=key))


def _artifact(manifest: Manifest, stage: str, key: str) -> Artifact:
    for artifact in manifest.stages[stage].artifacts if stage in manifest.stages else ():
        if artifact.key == key:
            return artifact
    raise BundleError(
        f"the manifest has no {stage} with the key {key:.20}",
        hint="write the repository again: ditc export-triton",
    )


def _refused(error: DitcError) -> Any:
    """The answer to a request that cannot be drawn."""
    hint = f" ({error.hint})" if error.hint else ""
    kinds = pb_utils.TritonError
    return _error(f"{error}{hint}", kinds.INTERNAL if isinstance(error, SessionError) else kinds.INVALID_ARG)


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message, code))
