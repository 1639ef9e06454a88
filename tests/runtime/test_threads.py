"""Several threads on one pipeline: every kind of session gives each thread what it gives one alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeCuda, FakeEngine

from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.batch import Batch
from ditc.runtime.bundle.manifest import Artifact, load_manifest
from ditc.runtime.errors import SessionError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import ComputeDevice, Session, to_numpy
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.sessions.onnxruntime_device import OnnxRuntimeDeviceSession
from ditc.runtime.sessions.residency import OnDemandSession, Residency
from ditc.runtime.sessions.tensorrt import TensorRTSession
from ditc.runtime.spec import DENOISER
from ditc.runtime.state import DenoiseState

THREADS, PICTURES = 4, 8
Open = Callable[[Path, Artifact], Session]


class Gpu:
    """Opens engines on one fake GPU."""

    def __init__(self, scale: int, *, low_vram: bool = False) -> None:
        self.cuda = FakeCuda()
        self.device, self.scale, self.low_vram = Device(self.cuda), scale, low_vram
        self.residency = Residency()
        self.device.enter()  # as the loader does, because at times no stage is loaded

    def open(self, model: Path, artifact: Artifact) -> Session:
        spec = artifact.spec

        def engine() -> Session:
            return TensorRTSession(FakeEngine(self.cuda, model, spec, scale=self.scale), spec, self.device)

        where = ComputeDevice(kind="cuda", name="fake")
        return OnDemandSession(spec, engine, self.residency, device=where) if self.low_vram else engine()


def bound(graphs: bool) -> Open:
    return lambda model, artifact: OnnxRuntimeDeviceSession(
        model, artifact.spec, device="cpu", threads=1, graphs=graphs
    )


def plain(model: Path, artifact: Artifact) -> Session:
    return OnnxRuntimeSession(model, artifact.spec, provider=CPU, threads=1)


KINDS: dict[str, Callable[[int], Open]] = {
    "ONNX Runtime": lambda scale: plain,
    "ONNX Runtime's IO binding": lambda scale: bound(graphs=False),
    "ONNX Runtime's IO binding with graphs": lambda scale: bound(graphs=True),
    "engines": lambda scale: Gpu(scale).open,
    "engines with --low-vram": lambda scale: Gpu(scale, low_vram=True).open,
}


def opened(bundle: Path, base: Pipeline, open_stage: Open) -> Pipeline:
    """The pipeline with other sessions for all its stages."""
    stages = load_manifest(bundle).stages
    artifacts = {name: stages[name].artifacts[0] for name in base.sessions}
    sessions = {name: open_stage(bundle / each.file.path, each) for name, each in artifacts.items()}
    return base.with_sessions(sessions, owned=True)


def request(index: int) -> Request:
    """Requests that differ in everything, but most of them not in their shapes, so that they share buffers."""
    return Request(
        prompt=("red cat", "blue dog", "an apple", "green tree")[index % 4],
        seed=index,
        guidance_scale=1.0 if index % 4 == 3 else 3.0,
        width=96 if index % 6 == 5 else 64,
        height=64,
        num_inference_steps=4,
        output_type="np",
    )


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """The results of work(0), work(1) and so on, from several threads that interrupt each other often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(work, range(PICTURES)))
    finally:
        sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def alone(pipeline: Pipeline) -> Sequence[Any]:
    return [pipeline.draw(request(index)).images for index in range(PICTURES)]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_share_a_pipeline_draw_what_each_draws_alone(
    tiny_bundle: Path, pipeline: Pipeline, alone: Sequence[Any], kind: str
) -> None:
    scale = pipeline.manifest.latents.scale_factor
    with opened(tiny_bundle, pipeline, KINDS[kind](scale)) as shared:
        pictures = in_threads(lambda index: shared.draw(request(index)).images)
    for index, (ours, theirs) in enumerate(zip(pictures, alone, strict=True)):
        assert np.array_equal(ours, theirs), index


def test_threads_that_share_the_reference_in_pytorch_draw_what_each_draws_alone(
    tiny_checkpoint: Path,
) -> None:
    shared = TorchModel(tiny_checkpoint).pipeline
    pictures = in_threads(lambda index: shared.draw(request(index)).images)  # the first runs read the weights
    for index, picture in enumerate(pictures):
        assert np.array_equal(picture, shared.draw(request(index)).images), index


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ONNX Runtime"])
def test_threads_that_step_pairs_of_requests_get_what_each_pair_gets_alone(
    tiny_bundle: Path, pipeline: Pipeline, kind: str
) -> None:
    pairs = [pair(pipeline, index) for index in range(PICTURES)]
    alone = Batch(pipeline.sessions[DENOISER])
    expected = [stepped(alone, states) for states in pairs]
    with opened(tiny_bundle, pipeline, KINDS[kind](pipeline.manifest.latents.scale_factor)) as shared:
        session = shared.sessions[DENOISER]
        batch = Batch(session)

        def work(index: int) -> list[Any]:
            latents = stepped(batch if index % 2 else Batch(session), pairs[index])
            return [to_numpy(each) for each in latents]

        results = in_threads(work)
        for ours, theirs in zip(results, expected, strict=True):
            assert all(map(np.array_equal, ours, theirs))


def pair(pipeline: Pipeline, index: int) -> list[DenoiseState]:
    plans = [pipeline.plan(replace(request(index + more), width=64, seed=more)) for more in (0, 1)]
    return [state for plan in plans for state in pipeline.start(plan)]


def stepped(batch: Batch, states: list[DenoiseState]) -> list[Any]:
    """The latents of both requests after all steps."""
    while not states[0].done:
        states = batch.step(states)
    return [state.latents for state in states]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_that_is_closed_while_threads_draw_ends_in_its_own_error(
    tiny_bundle: Path, pipeline: Pipeline, alone: Sequence[Any], kind: str
) -> None:
    shared = opened(tiny_bundle, pipeline, KINDS[kind](pipeline.manifest.latents.scale_factor))

    def draw(index: int) -> None:
        if index == PICTURES // 3:
            shared.close()
        try:
            assert np.array_equal(shared.draw(request(index)).images, alone[index])
        except SessionError as e:
            assert "closed" in str(e)

    in_threads(draw)
