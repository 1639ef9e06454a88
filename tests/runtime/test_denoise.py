"""The step primitive: several requests in one run, and the check for NaN and Inf."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from ditc.runtime import denoise, step_contract
from ditc.runtime.guard import spoiled_samples
from ditc.runtime.metrics import relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.rng import Generator
from ditc.runtime.session import Array, ComputeDevice, Session, Tensor
from ditc.runtime.spec import DENOISER, DType, StageSpec, TensorSpec
from ditc.runtime.state import DenoiseState, Rows

# Kernels choose their blocking by batch size, so results differ by fp32 rounding, over at most 4 steps of 2 layers.
FP32_BOUND = 1e-5


def states_of(pipeline: Pipeline) -> list[DenoiseState]:
    """Four requests that differ in prompt, seed, guidance (one has none), number of steps and step index."""
    common = {"height": 32, "width": 32}
    requests = [
        Request(prompt="red cat", seed=1, num_inference_steps=4, guidance_scale=3.0, **common),
        Request(prompt="", seed=2, num_inference_steps=3, guidance_scale=1.0, **common),
        Request(prompt="a photo of an apple", seed=3, num_inference_steps=6, guidance_scale=7.5, **common),
        Request(
            prompt="dog", seed=4, num_inference_steps=2, guidance_scale=2.0, negative_prompt="blue", **common
        ),
    ]
    states = [pipeline.start(pipeline.plan(request))[0] for request in requests]
    session = pipeline.sessions[DENOISER]
    for index, steps_ahead in ((0, 1), (2, 3)):
        for _ in range(steps_ahead):
            (states[index],) = denoise.step(session, [states[index]])
    return states


def test_different_requests_in_one_batch_get_what_they_get_alone(pipeline: Pipeline) -> None:
    session, together = pipeline.sessions[DENOISER], states_of(pipeline)
    alone = list(together)
    while any(not state.done for state in together):
        open_ = [index for index, state in enumerate(together) if not state.done]
        for index, state in zip(open_, denoise.step(session, [together[i] for i in open_]), strict=True):
            together[index] = state
            (alone[index],) = denoise.step(session, [alone[index]])
            assert together[index].step_index == alone[index].step_index
            assert relative_l2(together[index].latents, alone[index].latents) <= FP32_BOUND, index
            assert relative_l2(together[index].x0, alone[index].x0) <= FP32_BOUND, index  # type: ignore[arg-type]
            assert relative_l2(together[index].history, alone[index].history) <= FP32_BOUND, index
    assert all(state.latents.shape == (1, 8, 16, 16) for state in together)


def test_the_order_of_a_batch_does_not_matter(pipeline: Pipeline) -> None:
    session, states = pipeline.sessions[DENOISER], states_of(pipeline)
    forward = denoise.step(session, states)
    backward = denoise.step(session, states[::-1])[::-1]
    for a, b in zip(forward, backward, strict=True):
        assert relative_l2(a.latents, b.latents) <= FP32_BOUND


def test_a_step_leaves_its_input_states_as_they_were(pipeline: Pipeline) -> None:
    states = states_of(pipeline)
    before = [(np.array(state.latents), np.array(state.history), state.step_index) for state in states]
    denoise.step(pipeline.sessions[DENOISER], states)
    for state, (latents, history, index) in zip(states, before, strict=True):
        np.testing.assert_array_equal(state.latents, latents)
        np.testing.assert_array_equal(state.history, history)
        assert state.step_index == index


def test_a_finished_state_cannot_be_stepped(pipeline: Pipeline) -> None:
    (state,) = pipeline.start(pipeline.plan(Request(prompt="cat", num_inference_steps=1)))
    (finished,) = denoise.step(pipeline.sessions[DENOISER], [state])
    assert finished.done
    with pytest.raises(ValueError, match="finished"):
        denoise.step(pipeline.sessions[DENOISER], [state, finished])


def test_the_newest_x0_is_the_first_of_the_history(pipeline: Pipeline) -> None:
    (state,) = pipeline.start(pipeline.plan(Request(prompt="cat", num_inference_steps=3)))
    (after,) = denoise.step(pipeline.sessions[DENOISER], [state])
    np.testing.assert_array_equal(np.asarray(after.history)[:, 0], after.x0)


def test_non_finite_values_are_named_with_stage_step_and_sample(pipeline: Pipeline) -> None:
    (state,) = pipeline.start(pipeline.plan(Request(prompt=["cat", "dog"], num_inference_steps=4)))
    (state,) = denoise.step(pipeline.sessions[DENOISER], [state])
    assert not spoiled_samples(state, DENOISER)
    bad = replace(state, stats=np.array([[0, 1.5], [7, 2.5]], np.float32))
    (failure,) = spoiled_samples(bad, DENOISER)
    assert (failure.index, failure.step) == (1, 1)
    assert re.fullmatch(r"denoiser: step 1 of 4 left 7 NaN or Inf .* 2\.5", failure.reason)
    overflowed = replace(state, stats=np.array([[np.nan, np.nan], [0, 1]], np.float32))
    assert [failure.index for failure in spoiled_samples(overflowed, DENOISER)] == [0]


class Recorder(Session):
    """A denoiser that returns its latents unchanged and keeps the noise that it was fed."""

    def __init__(self) -> None:
        self._spec = StageSpec(
            DENOISER,
            (TensorSpec(step_contract.NOISE, DType.FLOAT32, ("batch", 4, "height", "width")),),
            (),
            {},
        )
        self.noise: list[Array] = []

    @property
    def spec(self) -> StageSpec:
        return self._spec

    @property
    def device(self) -> ComputeDevice:
        return ComputeDevice(kind="cpu", name="a test")

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.noise.append(np.asarray(feeds[step_contract.NOISE]))
        latents, history = feeds[step_contract.LATENTS], feeds[step_contract.HISTORY]
        stats = np.zeros((latents.shape[0], 2), np.float32)
        return {
            step_contract.NEXT_LATENTS: latents,
            step_contract.X0: latents,
            step_contract.NEXT_HISTORY: history,
            step_contract.STATS: stats,
        }

    def close(self) -> None:
        pass


def noisy_state(samples: int, seed: int) -> DenoiseState:
    latents = np.zeros((samples, 4, 8, 8), np.float32)
    stream = Generator(seed)
    return DenoiseState(
        latents=latents,
        history=latents[:, None],
        schedule=tuple(
            {
                step_contract.GUIDANCE_WEIGHTS: np.eye(samples, dtype=np.float32),
                step_contract.NOISE: stream.randn(latents.shape),
            }
            for _ in range(2)
        ),
        rows=Rows(np.arange(samples), {}),
    )


def test_each_request_of_a_batch_gets_its_own_noise_in_every_step() -> None:
    session = Recorder()
    states = start = [noisy_state(1, 1), noisy_state(2, 2)]
    for _ in range(2):
        states = denoise.step(session, states)
    for step, noise in enumerate(session.noise):
        wanted = [state.schedule[step][step_contract.NOISE] for state in start]
        np.testing.assert_array_equal(noise, np.concatenate(wanted))
