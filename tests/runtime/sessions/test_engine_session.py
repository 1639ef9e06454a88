"""Engine sessions over a fake GPU: the same pictures as ONNX Runtime, from buffers that never alias."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeCuda, FakeEngine

from ditc.runtime import denoise
from ditc.runtime.bundle.manifest import Tiling, load_manifest
from ditc.runtime.errors import NumericsError, SessionError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import load_parts
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import ComputeDevice, to_numpy
from ditc.runtime.sessions.buffers import DeviceArray
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.residency import OnDemandSession, Residency
from ditc.runtime.sessions.tensorrt import MAX_LOOPS, TensorRTSession
from ditc.runtime.spec import DENOISER, VAE_DECODER

SETTINGS = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 64, "width": 64, "seed": 3}


class Gpu:
    """A pipeline whose stages are engine sessions on one fake device."""

    def __init__(self, bundle: Path, cuda: FakeCuda | None = None, **engine: Any) -> None:
        self.cuda = cuda or FakeCuda()
        self.device = Device(self.cuda)
        parts = load_parts(bundle, LoadOptions(backend="onnxruntime", threads=1))
        for session in parts.sessions.values():
            session.close()
        scale = parts.manifest.latents.scale_factor
        self.engines = {
            name: FakeEngine(self.cuda, bundle / artifact.file.path, artifact.spec, scale=scale, **engine)
            for name, artifact in parts.artifacts.items()
        }
        sessions = {n: TensorRTSession(e, e.spec, self.device) for n, e in self.engines.items()}
        for encoder in parts.conditioning.encoders:
            object.__setattr__(encoder, "session", sessions[encoder.spec.stage])
        parts.conditioning.conditioner = sessions["conditioner"]
        self.pipeline = Pipeline(parts.manifest, sessions, parts.conditioning)

    @property
    def denoiser(self) -> TensorRTSession:
        session = self.pipeline.sessions[DENOISER]
        assert isinstance(session, TensorRTSession)
        return session

    def draw(self, prompt: str = "red cat", **changes: Any) -> np.ndarray:
        return np.asarray(
            self.pipeline.draw(Request(prompt=prompt, output_type="np", **{**SETTINGS, **changes})).images
        )


@pytest.fixture
def gpu(tiny_bundle: Path) -> Iterator[Gpu]:
    gpu = Gpu(tiny_bundle)
    yield gpu
    gpu.pipeline.close()


@pytest.fixture(scope="module")
def expected(pipeline: Pipeline) -> Any:
    """What ONNX Runtime draws; bit for bit, for the fake computes with the same kernels and one thread."""

    def draw(prompt: str = "red cat", **changes: Any) -> np.ndarray:
        return np.asarray(
            pipeline.draw(Request(prompt=prompt, output_type="np", **{**SETTINGS, **changes})).images
        )

    return draw


def test_a_loop_is_one_launch_and_draws_the_same_picture(gpu: Gpu, expected: Any) -> None:
    first = gpu.draw()
    assert "begin_capture" not in gpu.cuda.calls  # an engine runs once with its shapes before it is captured
    second = gpu.draw(seed=4)
    assert gpu.cuda.calls.count("begin_capture") == gpu.cuda.calls.count("launch") == 1
    gpu.cuda.calls.clear()
    third = gpu.draw("blue dog", guidance_scale=2.0, seed=5)
    assert gpu.cuda.calls.count("launch") == 1 and "begin_capture" not in gpu.cuda.calls
    assert np.array_equal(first, expected())
    assert np.array_equal(second, expected(seed=4))
    assert np.array_equal(third, expected("blue dog", guidance_scale=2.0, seed=5))


def test_a_launch_makes_no_call_a_step(gpu: Gpu) -> None:
    """Host work of a captured loop is the same for 5 steps and for 20."""
    calls = {}
    for count in (5, 20):
        states = gpu.pipeline.start(
            gpu.pipeline.plan(Request(prompt="red cat", **{**SETTINGS, "num_inference_steps": count}))
        )
        for _ in range(2):  # plain, then captured
            denoise.advance(gpu.denoiser, states[0], count)
        gpu.cuda.calls.clear()
        denoise.advance(gpu.denoiser, states[0], count)
        calls[count] = sorted(gpu.cuda.calls)
    assert calls[5] == calls[20] and len(calls[20]) < 15, calls


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_chunks_draw_the_same_picture_and_show_the_states_between(
    gpu: Gpu, expected: Any, at_once: int
) -> None:
    gpu.pipeline.steps_per_launch = at_once
    for _ in range(2):
        steps = []
        request = Request(prompt="red cat", output_type="np", **SETTINGS)
        output = gpu.pipeline.draw(request, on_step=steps.append)
        assert [step.index for step in steps] == sorted({*range(at_once - 1, 5, at_once), 4})
        assert np.array_equal(np.asarray(output.images), expected())
    assert gpu.cuda.calls.count("launch") == {1: 0, 2: 3, 3: 2}[at_once]


def test_every_state_between_is_that_of_onnx_runtime_and_stays_readable(gpu: Gpu, pipeline: Pipeline) -> None:
    request = Request(prompt="red cat", **SETTINGS)
    ours, theirs = list(gpu.pipeline.steps(request)), list(pipeline.steps(request))
    for one, other in zip(ours, theirs, strict=True):
        for name in ("latents", "history", "x0", "stats"):
            assert np.array_equal(to_numpy(getattr(one.state, name)), to_numpy(getattr(other.state, name))), (
                name
            )


def test_a_cancelled_request_leaves_nothing_behind(gpu: Gpu, expected: Any) -> None:
    gpu.draw()
    before = gpu.cuda.used()
    steps = gpu.pipeline.steps(Request(prompt="blue dog", **SETTINGS))
    for _ in range(3):
        next(steps)
    steps.close()
    del steps
    assert np.array_equal(gpu.draw(), expected())
    assert gpu.cuda.used() - before <= gpu.denoiser._pools["next_latents"].size_bytes * 8


def test_several_pictures_and_batches_beyond_the_profile_are_the_same(gpu: Gpu, expected: Any) -> None:
    for count in (2, 6):
        changes = {"num_images_per_prompt": count, "num_inference_steps": 2}
        assert np.array_equal(gpu.draw(**changes), expected(**changes))


def test_sizes_alternate_and_each_has_its_graph(gpu: Gpu, expected: Any) -> None:
    for _ in range(3):
        for height, width in ((64, 64), (32, 96)):
            assert np.array_equal(gpu.draw(height=height, width=width), expected(height=height, width=width))
    assert gpu.cuda.calls.count("begin_capture") == 2 and gpu.cuda.calls.count("launch") == 4


def test_the_number_of_kept_loops_is_bounded(gpu: Gpu) -> None:
    state = gpu.pipeline.start(
        gpu.pipeline.plan(Request(prompt="red cat", **{**SETTINGS, "num_inference_steps": 20}))
    )[0]
    for count in range(2, MAX_LOOPS + 5):
        denoise.advance(gpu.denoiser, state, count)
    assert len(gpu.denoiser._loops) == MAX_LOOPS


@pytest.mark.parametrize("how", ["library", "driver"])
def test_what_cannot_be_captured_runs_step_by_step(tiny_bundle: Path, expected: Any, how: str) -> None:
    gpu = Gpu(tiny_bundle, FakeCuda(refuse_capture=how == "driver"), can_capture=how != "library")
    for _ in range(3):
        assert np.array_equal(gpu.draw(), expected())
    assert "launch" not in gpu.cuda.calls and gpu.cuda.calls.count("begin_capture") == (how == "driver")
    assert gc.isenabled()  # off while a loop is captured
    gpu.pipeline.close()


def test_a_workspace_that_moved_makes_a_new_graph(gpu: Gpu, expected: Any) -> None:
    for _ in range(2):
        gpu.draw()
    gpu.device.reserve(1 << 20)
    assert np.array_equal(gpu.draw(), expected())
    assert gpu.cuda.calls.count("begin_capture") == 2 and gpu.cuda.calls.count("destroy_graph") == 1


def test_stages_share_one_workspace_as_large_as_the_largest_needs(tiny_bundle: Path) -> None:
    gpu = Gpu(tiny_bundle)
    for name, engine in gpu.engines.items():
        engine.workspace = 1 << (18 + len(name) % 3)  # far more than what the fake adds for the sizes
    gpu.draw()
    largest = max(engine.workspace for engine in gpu.engines.values())
    assert largest <= gpu.device.workspace[1] < 1.5 * largest
    gpu.pipeline.close()


def test_the_workspace_is_that_of_the_sizes_that_ran_and_grows_with_them(gpu: Gpu, expected: Any) -> None:
    """Not of the profile's largest: a convolution at 4 x 1024 x 1024 reserves 4.3 GB, at 64 x 64 it needs 18 MB."""
    taken = []
    for side in (32, 64, 32, 64):
        for _ in range(3):  # plain, captured, replayed
            assert np.array_equal(gpu.draw(height=side, width=side), expected(height=side, width=side))
        taken.append(gpu.device.workspace[1])
    assert taken[0] < taken[1] == taken[2] == taken[3]


STEP = {"timestep": np.zeros(1, np.float32), "row_of": np.zeros(2, np.int64)}


@pytest.mark.parametrize(
    "other",
    [
        {"timestep": STEP["timestep"]},
        {**STEP, "row_of": np.zeros(3, np.int64)},
        {**STEP, "timestep": np.zeros(1, np.float64)},
    ],
)
def test_steps_of_a_loop_that_differ_in_names_sizes_or_types_are_refused(
    gpu: Gpu, other: dict[str, np.ndarray]
) -> None:
    for per_step in ([], [STEP, other]):
        with pytest.raises(SessionError, match=f"a loop of {len(per_step)} steps needs the same feeds"):
            gpu.denoiser.run_loop({}, per_step, carry={}, keep=())


def test_closing_frees_every_byte(tiny_bundle: Path) -> None:
    gpu = Gpu(tiny_bundle)
    for _ in range(2):
        gpu.draw()
    gpu.pipeline.close()
    gc.collect()
    assert gpu.cuda.used() == 0 and gpu.device.allocated_bytes == 0
    assert gpu.cuda.calls.count("destroy_stream") == 1
    assert all(engine.closed for engine in gpu.engines.values())


def test_a_second_request_allocates_nothing(gpu: Gpu) -> None:
    for _ in range(2):
        gpu.draw()
    gpu.cuda.calls.clear()
    gpu.draw(seed=9)
    assert "allocate" not in gpu.cuda.calls and "free" not in gpu.cuda.calls


def test_constant_feeds_are_sent_once_and_a_changed_array_again(gpu: Gpu) -> None:
    (state,) = gpu.pipeline.start(gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    (state,) = denoise.step(gpu.denoiser, [state])
    gpu.cuda.calls.clear()
    (state,) = denoise.step(gpu.denoiser, [state])
    small = len(state.schedule[0]) + 1  # of the step, and row_of
    assert gpu.cuda.calls.count("upload") == small
    name, rows = next(iter(state.rows.conditioning.items()))
    changed = np.array(rows)
    changed *= 0
    other = replace(state, rows=denoise.Rows(state.rows.row_of, {**state.rows.conditioning, name: changed}))
    one, two = (to_numpy(denoise.step(gpu.denoiser, [s])[0].x0) for s in (state, other))
    assert not np.array_equal(one, two)
    changed += 1  # the same array object, other values
    assert not np.array_equal(two, to_numpy(denoise.step(gpu.denoiser, [other])[0].x0))


def test_latents_go_to_the_decoder_on_the_device(gpu: Gpu) -> None:
    gpu.pipeline.tiling = None
    states = [step.state for step in gpu.pipeline.steps(Request(prompt="red cat", **SETTINGS))][-1:]
    gpu.cuda.calls.clear()
    gpu.pipeline.decode(states, gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    assert gpu.cuda.calls.count("upload") == 0 and gpu.cuda.calls.count("download") == 1


def test_tiles_are_decoded_through_an_engine_too(gpu: Gpu, pipeline: Pipeline, expected: Any) -> None:
    gpu.pipeline.tiling, before = Tiling(tile=48, stride=32), pipeline.tiling
    pipeline.tiling = gpu.pipeline.tiling
    try:
        assert np.array_equal(gpu.draw(), expected())
    finally:
        pipeline.tiling = before


def test_a_step_that_leaves_nan_is_named_though_the_loop_was_one_launch(gpu: Gpu) -> None:
    plan = gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS))
    (state,) = gpu.pipeline.start(plan)
    spoiled = {
        **state.schedule[2],
        denoise.COEFFICIENTS: np.full_like(state.schedule[2][denoise.COEFFICIENTS], np.nan),
    }
    state = replace(state, schedule=(*state.schedule[:2], spoiled, *state.schedule[3:]))
    with pytest.raises(NumericsError, match="denoiser: step 3 of 5 left"):
        for _ in gpu.pipeline.run([state], steps_per_launch=5):
            pass


def test_dlpack_hands_a_tensor_out_and_takes_one_in_without_a_copy(gpu: Gpu) -> None:
    import torch

    (state,) = gpu.pipeline.start(gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    (state,) = denoise.step(gpu.denoiser, [state])
    latents = state.latents
    assert isinstance(latents, DeviceArray)
    ours, pointer = torch.from_dlpack(latents), latents.pointer
    assert ours.data_ptr() == pointer and np.array_equal(ours.numpy(), latents.numpy())
    del latents
    (after,) = denoise.step(gpu.denoiser, [replace(state, latents=ours)])
    (same,) = denoise.step(gpu.denoiser, [state])
    assert np.array_equal(to_numpy(after.latents), to_numpy(same.latents))
    kept = to_numpy(state.latents).copy()
    del state, after, same
    gc.collect()
    for _ in range(3):
        gpu.draw()
    assert np.array_equal(ours.numpy(), kept)  # torch still holds the buffer: nobody writes into it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda feeds: feeds.pop("timestep"), "denoiser: lacks timestep"),
        (lambda feeds: feeds.update(other=feeds["timestep"]), "denoiser: does not take other"),
        (lambda feeds: feeds.update(timestep=feeds["timestep"].astype(np.float64)), "timestep is float64"),
        (
            lambda feeds: feeds.update(timestep=np.zeros(2, np.float32)),
            "batch is 1 in latents and 2 in timestep",
        ),
        (lambda feeds: feeds.update(timestep=np.zeros((1, 1), np.float32)), r"timestep is \(1, 1\)"),
        (
            lambda feeds: feeds.update(latents=np.zeros((1, 8, 900, 2), np.float32)),
            "height of latents is 900",
        ),
    ],
)
def test_a_wrong_feed_is_refused_before_anything_is_copied(gpu: Gpu, change: Any, message: str) -> None:
    (state,) = gpu.pipeline.start(gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    feeds: dict[str, Any] = {
        "latents": state.latents,
        "history": state.history,
        "row_of": state.rows.row_of,
        **state.rows.conditioning,
        **state.schedule[0],
    }
    gpu.cuda.calls.clear()
    change(feeds)
    with pytest.raises(SessionError, match=message):
        gpu.denoiser.run(feeds)
    assert not gpu.cuda.calls


def test_an_engine_that_does_not_run_is_an_error_with_its_words(tiny_bundle: Path) -> None:
    gpu = Gpu(tiny_bundle)
    (state,) = gpu.pipeline.start(gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    gpu.engines[DENOISER].refuse_address = "timestep"
    for run in (lambda: denoise.step(gpu.denoiser, [state]), lambda: denoise.advance(gpu.denoiser, state, 5)):
        with pytest.raises(SessionError, match="denoiser: the engine refuses timestep: no message"):
            run()
    gpu.engines[DENOISER].refuse_address = ""
    gpu.engines[DENOISER].fail = True
    with pytest.raises(SessionError, match="denoiser: tensorrt did not run: the fake was told to fail"):
        denoise.step(gpu.denoiser, [state])
    with pytest.raises(
        SessionError, match="denoiser: the engine refused step 0 of 5: the fake was told to fail"
    ):
        denoise.advance(gpu.denoiser, state, 5)
    gpu.pipeline.close()


def test_an_engine_with_other_names_than_promised_is_refused(tiny_bundle: Path) -> None:
    artifact = load_manifest(tiny_bundle).stages[VAE_DECODER].artifacts[0]
    cuda = FakeCuda()
    engine = FakeEngine(cuda, tiny_bundle / artifact.file.path, artifact.spec)
    renamed = replace(artifact.spec, inputs=(replace(artifact.spec.inputs[0], name="z"),))
    with pytest.raises(
        SessionError, match="the engine and the manifest differ in latents float32, z float32"
    ):
        TensorRTSession(engine, renamed, Device(cuda))


def test_a_profile_for_each_orientation_is_chosen_by_size(tiny_bundle: Path, expected: Any) -> None:
    artifact = load_manifest(tiny_bundle).stages[DENOISER].artifacts[0]
    tall, wide = artifact.spec.profile["height"], artifact.spec.profile["width"]
    split = tall.max // 2
    ranges = (
        {"height": replace(tall, max=split)},
        {"height": replace(tall, min=split + 1, opt=tall.max), "width": wide},
    )
    gpu = Gpu(tiny_bundle)
    session = TensorRTSession(replace(gpu.engines[DENOISER], ranges=ranges), artifact.spec, gpu.device)
    gpu.pipeline.sessions[DENOISER] = session
    for cells in (split, tall.max):
        scale = gpu.pipeline.manifest.latents.scale_factor
        size = {"height": cells * scale, "width": wide.min * scale, "num_inference_steps": 2}
        assert np.array_equal(gpu.draw(**size), expected(**size))
    assert set(session._contexts) == {0, 1}
    session.close()


def test_on_demand_stages_are_loaded_one_at_a_time_and_draw_the_same(
    tiny_bundle: Path, expected: Any
) -> None:
    gpu = Gpu(tiny_bundle)
    residency, loaded, most = Residency(), [], []

    def opener(name: str) -> Any:
        def open_it() -> TensorRTSession:
            loaded.append(name)
            return TensorRTSession(replace(gpu.engines[name]), gpu.engines[name].spec, gpu.device)

        return open_it

    gpu.device.enter()
    everything = gpu.cuda.used()
    for session in gpu.pipeline.sessions.values():
        session.close()
    there = ComputeDevice(kind="cuda", name="fake")
    lazy = {n: OnDemandSession(e.spec, opener(n), residency, device=there) for n, e in gpu.engines.items()}
    gpu.pipeline.sessions.update(lazy)
    gpu.pipeline.conditioning.conditioner = lazy["conditioner"]
    for encoder in gpu.pipeline.conditioning.encoders:
        object.__setattr__(encoder, "session", lazy[encoder.spec.stage])
    for _ in range(2):
        assert np.array_equal(gpu.draw(), expected())
        most.append([name for name, session in lazy.items() if session._inner is not None])
    assert most == [[VAE_DECODER]] * 2  # the last that was used
    assert loaded.count(DENOISER) == loaded.count(VAE_DECODER) == 2  # once a request, not once a step
    gpu.pipeline.close()
    gpu.device.leave()
    gc.collect()
    assert gpu.cuda.used() == 0 and everything >= 0


def test_out_of_memory_names_what_helps(tiny_bundle: Path) -> None:
    with pytest.raises(SessionError, match="out of GPU memory"):
        Gpu(tiny_bundle, FakeCuda(total_bytes=1 << 16)).draw()
