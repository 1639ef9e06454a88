"""Loops of engine sessions on a fake GPU: one launch runs many steps and gives the same states as single steps."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_pipeline import SETTINGS, Gpu
from fake_gpu import FakeCuda

from ditc.runtime import denoise, step_contract
from ditc.runtime.batch import Batch
from ditc.runtime.errors import NumericsError, SessionError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import to_numpy
from ditc.runtime.sessions import tensorrt
from ditc.runtime.sessions.tensorrt import MAX_LOOPS


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


def test_a_launch_makes_as_many_calls_for_20_steps_as_for_5(gpu: Gpu) -> None:
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


def test_each_of_two_alternating_sizes_has_its_graph(gpu: Gpu, expected: Any) -> None:
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


def test_single_steps_have_a_bound_of_their_own(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "MAX_SINGLE_STEPS", 2)
    plan = gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS))
    (state,) = gpu.pipeline.start(plan)
    for count in (5, 3):
        denoise.advance(gpu.denoiser, state, count)
    for width in (64, 96, 32, 96):
        request = Request(prompt="red cat", **{**SETTINGS, "width": width})
        Batch(gpu.denoiser).step(gpu.pipeline.start(gpu.pipeline.plan(request)))
    assert [plan.count for plan in gpu.denoiser._loops] == [5, 3, 1, 1]


def test_a_loop_that_needs_the_memory_of_others_gets_it_and_a_failed_one_leaves_none_behind(gpu: Gpu) -> None:
    def step(side: int) -> None:
        request = Request(prompt="red cat", **{**SETTINGS, "height": side, "width": side})
        Batch(gpu.denoiser).step(gpu.pipeline.start(gpu.pipeline.plan(request)))

    step(64)
    step(32)
    (state,) = gpu.pipeline.start(gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    denoise.advance(gpu.denoiser, state, 3)
    assert len(gpu.denoiser._loops) == 3
    gpu.cuda.total_bytes = gpu.cuda.used() + 4096  # less than the table of a loop of 5 steps with its buffers
    denoise.advance(gpu.denoiser, state, 5)
    assert [plan.count for plan in gpu.denoiser._loops] == [5]
    gpu.denoiser._close_loops()
    used = gpu.cuda.used()
    gpu.cuda.total_bytes = used + 4096
    with pytest.raises(SessionError, match="out of GPU memory"):
        denoise.advance(gpu.denoiser, state, 5)
    assert gpu.cuda.used() == used


@pytest.mark.parametrize("how", ["library", "driver"])
def test_a_loop_that_cannot_be_captured_runs_step_by_step(tiny_bundle: Path, expected: Any, how: str) -> None:
    gpu = Gpu(tiny_bundle, FakeCuda(refuse_capture=how == "driver"), can_capture=how != "library")
    for _ in range(3):
        assert np.array_equal(gpu.draw(), expected())
    assert "launch" not in gpu.cuda.calls and gpu.cuda.calls.count("begin_capture") == (how == "driver")
    assert gc.isenabled()  # it is off only during a capture
    gpu.pipeline.close()


def test_a_workspace_that_moved_makes_a_new_graph(gpu: Gpu, expected: Any) -> None:
    for _ in range(2):
        gpu.draw()
    gpu.device.reserve(1 << 20)
    assert np.array_equal(gpu.draw(), expected())
    assert gpu.cuda.calls.count("begin_capture") == 2 and gpu.cuda.calls.count("destroy_graph") == 1


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
        with pytest.raises(
            SessionError, match=f"a loop has {len(per_step)} steps: it needs at least one step, and"
        ):
            gpu.denoiser.run_loop({}, per_step, carry={}, keep=())


def test_a_step_that_leaves_nan_is_named_even_in_a_loop_of_one_launch(gpu: Gpu) -> None:
    plan = gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS))
    (state,) = gpu.pipeline.start(plan)
    spoiled = {
        **state.schedule[2],
        step_contract.COEFFICIENTS: np.full_like(state.schedule[2][step_contract.COEFFICIENTS], np.nan),
    }
    state = replace(state, schedule=(*state.schedule[:2], spoiled, *state.schedule[3:]))
    with pytest.raises(NumericsError, match="denoiser: step 3 of 5 left"):
        for _ in gpu.pipeline.run([state], steps_per_launch=5):
            pass
