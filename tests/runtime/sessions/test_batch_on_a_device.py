"""Batches whose tensors are on a device: a steady batch copies nothing to the host, and a changed one only a little."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeCuda, FakeEngine

from ditc.runtime import denoise
from ditc.runtime.batch import Batch, padded_sizes
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import SessionError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import Session, to_numpy
from ditc.runtime.sessions.buffers import DeviceArray
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.onnxruntime_device import OnnxRuntimeDeviceSession, OrtTensor
from ditc.runtime.sessions.tensorrt import TensorRTSession
from ditc.runtime.spec import DENOISER
from ditc.runtime.state import DenoiseState

# Kernels choose their blocking by batch size, so results differ by fp32 rounding: over at most eight steps, two layers.
FP32_BOUND = 1e-5
PROMPTS = ("red cat", "blue dog", "a photo of an apple", "green tree")


class OnFakeGpu:
    """The tiny denoiser as an engine session on a fake GPU."""

    def __init__(self, bundle: Path) -> None:
        self.cuda = FakeCuda()
        manifest = load_manifest(bundle)
        artifact = manifest.stages[DENOISER].artifacts[0]
        scale = manifest.latents.scale_factor
        engine = FakeEngine(self.cuda, bundle / artifact.file.path, artifact.spec, scale=scale)
        self.session = TensorRTSession(engine, engine.spec, Device(self.cuda))


@pytest.fixture
def gpu(tiny_bundle: Path) -> Iterator[OnFakeGpu]:
    gpu = OnFakeGpu(tiny_bundle)
    yield gpu
    gpu.session.close()


@pytest.fixture
def bound(tiny_bundle: Path) -> Iterator[OnnxRuntimeDeviceSession]:
    artifact = load_manifest(tiny_bundle).stages[DENOISER].artifacts[0]
    session = OnnxRuntimeDeviceSession(
        tiny_bundle / artifact.file.path, artifact.spec, device="cpu", threads=1, graphs=True
    )
    yield session
    session.close()


def start(pipeline: Pipeline, index: int, **settings: Any) -> DenoiseState:
    request = Request(
        prompt=PROMPTS[index],
        seed=index,
        **{"num_inference_steps": 8, "guidance_scale": 3.0, "height": 64, "width": 64, **settings},
    )
    (state,) = pipeline.start(pipeline.plan(request))
    return state


def check_alone(states: list[DenoiseState], expected: list[DenoiseState]) -> None:
    for index, (state, alone) in enumerate(zip(states, expected, strict=True)):
        assert state.step_index == alone.step_index
        for name in ("latents", "history", "x0"):
            ours, theirs = to_numpy(getattr(state, name)), to_numpy(getattr(alone, name))
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            assert error <= FP32_BOUND, f"{name} of request {index}: {error}"


CHANGES = ((0, 1), (0, 1), (0, 1, 2), (2, 0, 1, 3), (2, 1, 3), (3, 1), (1, 3), (3,))


def changing_batch(
    session: Session, pipeline: Pipeline, turns: tuple[tuple[int, ...], ...] = CHANGES
) -> Iterator[list[DenoiseState]]:
    """Requests join, leave and change places. Each is compared with the same request drawn alone on the CPU."""
    alone = pipeline.sessions[DENOISER]
    batch = Batch(session)
    states = {i: start(pipeline, i, guidance_scale=1.0 if i == 2 else 3.0 + i) for i in range(4)}
    expected = dict(states)
    for members in turns:
        stepped = batch.step([states[i] for i in members])
        for i, state in zip(members, stepped, strict=True):
            states[i] = state
            (expected[i],) = denoise.step(alone, [expected[i]])
        check_alone([states[i] for i in members], [expected[i] for i in members])
        yield stepped


def test_requests_that_share_a_batch_on_a_fake_gpu_get_what_they_get_alone(
    gpu: OnFakeGpu, pipeline: Pipeline
) -> None:
    for stepped in changing_batch(gpu.session, pipeline):
        assert all(isinstance(state.latents, DeviceArray) for state in stepped)


def test_requests_that_share_a_batch_in_onnxruntimes_memory_get_what_they_get_alone(
    bound: OnnxRuntimeDeviceSession, pipeline: Pipeline
) -> None:
    for stepped in changing_batch(bound, pipeline):
        assert all(isinstance(state.latents, OrtTensor) for state in stepped)


def test_a_captured_graph_sees_the_rows_of_a_request_that_took_the_place_of_another(
    bound: OnnxRuntimeDeviceSession, pipeline: Pipeline
) -> None:
    """The shapes stay the same, so the graph is replayed, and the new rows are in the memory of the old ones."""
    list(changing_batch(bound, pipeline, ((0, 1), (0, 1), (0, 1), (0, 3), (0, 3), (1, 3))))


def test_a_captured_graph_does_not_keep_the_rows_of_a_batch_that_is_gone(
    bound: OnnxRuntimeDeviceSession, pipeline: Pipeline
) -> None:
    batch, states = Batch(bound), [start(pipeline, i) for i in range(2)]
    for _ in range(3):
        states = batch.step(states)
    rows = [weakref.ref(tensor.value) for tensor in batch._stack.tensors.values()]
    del batch
    gc.collect()
    assert [row() for row in rows] == [None] * len(rows)


@pytest.mark.parametrize("name", ["gpu", "bound"])
def test_latents_of_another_element_type_are_refused_before_they_are_copied(
    name: str, request: pytest.FixtureRequest, pipeline: Pipeline
) -> None:
    """Their bytes would be misread, and float64 would be written past the end of the buffer."""
    fixture = request.getfixturevalue(name)
    session: Session = fixture.session if isinstance(fixture, OnFakeGpu) else fixture
    states = [start(pipeline, i) for i in range(2)]
    doubled = replace(states[0], latents=to_numpy(states[0].latents).astype(np.float64))
    with pytest.raises(SessionError, match="float64"):
        Batch(session).step([doubled, states[1]])


def test_a_steady_batch_is_one_launch_and_one_small_upload(gpu: OnFakeGpu, pipeline: Pipeline) -> None:
    batch, states = Batch(gpu.session), [start(pipeline, i) for i in range(4)]
    for _ in range(2):  # run plainly, then captured
        states = batch.step(states)
    for _ in range(4):
        gpu.cuda.calls.clear()
        states = batch.step(states)
        carried, results = 2, 4
        assert sorted(gpu.cuda.calls) == ["copy"] * (carried + results) + ["launch", "upload"], "nobody waits"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_statistics_of_a_batch_are_read_in_one_copy(gpu: OnFakeGpu, pipeline: Pipeline, count: int) -> None:
    batch, states = Batch(gpu.session, read_stats=True), [start(pipeline, i) for i in range(count)]
    states = batch.step(states)
    gpu.cuda.calls.clear()
    states = batch.step(states)
    assert gpu.cuda.calls.count("download") == gpu.cuda.calls.count("synchronize") == 1
    for state in states:
        assert isinstance(state.stats, np.ndarray) and state.stats.shape == (1, 2)


def test_a_change_of_members_sends_only_the_rows_of_the_request_that_joined(
    gpu: OnFakeGpu, pipeline: Pipeline
) -> None:
    batch, states = Batch(gpu.session), [start(pipeline, i) for i in range(4)]
    together = batch.step(states[:3])
    conditioning = len(states[0].rows.conditioning)

    def uploads(members: list[DenoiseState]) -> tuple[list[DenoiseState], int]:
        gpu.cuda.calls.clear()
        after = batch.step(members)
        assert gpu.cuda.calls.count("download") == 0
        return after, gpu.cuda.calls.count("upload")

    small = 2  # the table of the inputs that differ by step, and row_of, which changed
    together, count = uploads(together[1:])
    assert count == small, "requests that stay are not sent again"
    together, count = uploads([*together, states[3]])
    pads = 2  # latents and history of the sample that fills the batch of 4
    assert count == small + conditioning + 2 + pads, (
        "the rows, latents and history of the request that joined"
    )
    together, count = uploads(together[::-1])
    assert count == small + pads, "another order sends nothing but row_of"


class Watched:
    """The session, and what each of its launches was given."""

    def __init__(self, session: TensorRTSession) -> None:
        self.session, self.spec, self.device = session, session.spec, session.device
        self.given: list[dict[str, Any]] = []
        self.empty = session.empty

    def run_loop(self, feeds: Any, per_step: Any, **options: Any) -> dict[str, Any]:
        self.given.append({name: to_numpy(tensor) for name, tensor in {**feeds, **per_step[0]}.items()})
        return self.session.run_loop(feeds, per_step, **options)


def test_what_pads_a_batch_is_finite_without_weight_and_stays_zero(
    gpu: OnFakeGpu, pipeline: Pipeline
) -> None:
    """The memory of the fake GPU is NaN before something is written to it."""
    session = Watched(gpu.session)
    batch, states = Batch(session), [start(pipeline, i, guidance_scale=1.0 + i) for i in range(4)]
    for members in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 2), (0, 2), (0, 2, 1), (1,), (2, 1, 0)):
        for i, state in zip(members, batch.step([states[i] for i in members]), strict=True):
            states[i] = state
        given, count = session.given[-1], len(members)
        assert len(given["latents"]) == 1 << (count - 1).bit_length()
        assert all(np.isfinite(each).all() for each in given.values() if each.dtype.kind == "f")
        for name in ("latents", "history", "coefficients", "guidance_weights"):
            assert not given[name][count:].any(), name
    assert len({tuple(each["guidance_weights"].shape) for each in session.given}) <= 4


def test_texts_that_pad_are_copied_once_and_not_again(gpu: OnFakeGpu, pipeline: Pipeline) -> None:
    batch, states = Batch(gpu.session), [start(pipeline, i) for i in range(3)]
    tensors: list[Any] = []
    for _ in range(3):
        states = batch.step(states)
        tensors.append(dict(batch._stack.tensors))
        assert batch._stack.size == 8, "two rows for each of four samples"
    assert all(tensors[0][name] is later[name] for later in tensors for name in later)


def test_one_after_another_in_full_batches_gets_its_own_texts(gpu: OnFakeGpu, pipeline: Pipeline) -> None:
    """Each fills the stack of the one before, in the same memory, so a session must not take it for unchanged."""
    list(changing_batch(gpu.session, pipeline, ((0, 1), (0, 1), (0, 1), (0, 3), (0, 3), (1, 3), (1,), (3,))))


def test_batches_of_every_size_need_one_graph_per_padded_size(tiny_bundle: Path, pipeline: Pipeline) -> None:
    on = OnFakeGpu(tiny_bundle)
    states = [start(pipeline, i) for i in range(4)]
    batch = Batch(on.session)
    for _ in range(3):
        for count in (1, 2, 3, 4, 3, 2, 1):
            batch.step(states[:count])
    assert padded_sizes(on.session) == (1, 2, 4)
    assert len(on.session._loops) == on.cuda.calls.count("begin_capture") == 3
    on.session.close()


def test_memory_of_a_batch_is_freed_with_it(gpu: OnFakeGpu, pipeline: Pipeline) -> None:
    states = [start(pipeline, i) for i in range(2)]
    denoise.step(gpu.session, states)  # pools and buffers of the session are made
    before = gpu.cuda.used()
    for _ in range(3):
        denoise.step(gpu.session, states)
    assert gpu.cuda.used() == before
