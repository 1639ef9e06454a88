"""Guidance as weights of rows: the same sums as in diffusers, on the same steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.pag.pag_utils import PAGMixin

from ditc.runtime.bundle.manifest import PerturbedAttentionGuidance, SkipLayerGuidance
from ditc.runtime.guidance import (
    guidance_feeds,
    guidance_weights,
    is_guided,
    perturbed_attention_scales,
    skip_layer_scales,
)
from ditc.runtime.step_contract import GUIDANCE, GUIDANCE_WEIGHTS, SKIP_GATE, GuidanceMode, StepContract

SKIP = SkipLayerGuidance(layers=(7, 8, 9), scale=2.8, start=0.01, stop=0.2)
GATED = StepContract(skip_gate=True)


def test_the_weights_add_up_to_what_diffusers_computes() -> None:
    batch, g, s = 2, 5.0, 2.8
    outputs = np.random.default_rng(0).standard_normal((3 * batch, 7)).astype(np.float32)
    u, c, k = np.split(outputs, 3)
    assert np.allclose(guidance_weights(batch, g) @ outputs[: 2 * batch], u + g * (c - u), atol=1e-5)
    wanted = u + g * (c - u) + (c - k) * s
    assert np.allclose(guidance_weights(batch, g, s) @ outputs, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "start", "stop", "inside"),
    [
        (28, 0.01, 0.2, [1, 2, 3, 4, 5]),
        (20, 0.0, 0.2, [1, 2, 3]),  # both ends are excluded, and steps 0 and 4 lie on them
        (5, 0.2, 0.8, [2, 3]),
        (10, 0.5, 0.5, []),
    ],
)
def test_the_third_row_exists_only_on_the_steps_of_diffusers(
    steps: int, start: float, stop: float, inside: list[int]
) -> None:
    skip = SkipLayerGuidance(layers=(1,), scale=2.0, start=start, stop=stop)
    scales = skip_layer_scales(skip, steps, steps)
    rows = [f[GUIDANCE_WEIGHTS].shape[1] for f in guidance_feeds(GATED, 1, 3.0, scales)]
    assert [index for index, count in enumerate(rows) if count == 3] == inside
    assert len(rows) == steps and set(rows) <= {2, 3}


def test_only_the_third_rows_skip_layers() -> None:
    feeds = guidance_feeds(GATED, 2, 3.0, skip_layer_scales(SKIP, 28, 28))
    assert feeds[3][SKIP_GATE].tolist() == [0, 0, 0, 0, 1, 1]
    assert feeds[20][SKIP_GATE].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_gated_rows_count_as_perturbed_attention_guidance_of_diffusers(guidance_scale: float) -> None:
    """With and without classifier-free guidance, whose rows come first."""
    batch, guided = 2, guidance_scale > 1
    outputs = torch.randn((3 if guided else 2) * batch, 7, generator=torch.Generator().manual_seed(0))
    mixin = PAGMixin()
    mixin._pag_scale, mixin._pag_adaptive_scale, mixin.pag_applied_layers = 3.0, 0.0, ["blocks.8"]
    wanted = mixin._apply_perturbed_attention_guidance(outputs, guided, guidance_scale, 500)
    (feeds,) = guidance_feeds(GATED, batch, guidance_scale, [3.0])
    assert np.allclose(feeds[GUIDANCE_WEIGHTS] @ outputs.numpy(), wanted.numpy(), atol=1e-5)
    assert feeds[SKIP_GATE].tolist() == [0] * (len(outputs) - batch) + [1] * batch


@pytest.mark.parametrize("adaptive_scale", [0.0, 0.004, -1.0])
def test_the_scale_of_perturbed_attention_falls_as_in_diffusers(adaptive_scale: float) -> None:
    timesteps = [999.0, 750.5, 251.0, 249.0, 3.0]
    mixin = PAGMixin()
    mixin._pag_scale, mixin._pag_adaptive_scale, mixin.pag_applied_layers = 3.0, adaptive_scale, ["blocks.8"]
    pag = PerturbedAttentionGuidance(layers=(8,), scale=3.0, adaptive_scale=adaptive_scale)
    found = perturbed_attention_scales(pag, timesteps)
    assert found == pytest.approx([mixin._get_pag_scale(t) for t in timesteps])
    assert (0.0 in found) == (adaptive_scale > 0), "where the scale is 0, the gated rows are not run"


@pytest.mark.parametrize(
    ("interval", "steps"), [((0.2, 0.8), 20), ((0.0, 0.29), 100), ((0.3, 1.0), 7), ((0.4, 0.45), 3)]
)
def test_guidance_acts_on_the_steps_of_diffusers_guiders(interval: tuple[float, float], steps: int) -> None:
    guider = ClassifierFreeGuidance(guidance_scale=3.0, start=interval[0], stop=interval[1])
    wanted = []
    for step in range(steps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(0))
        wanted.append(3 if guider.num_conditions == 2 else 1)
    feeds = guidance_feeds(GATED, 2, 3.0, [2.0] * steps, interval)
    assert [step[GUIDANCE_WEIGHTS].shape[1] // 2 for step in feeds] == wanted
    for step in feeds:
        if step[GUIDANCE_WEIGHTS].shape[1] == 2:
            assert step[GUIDANCE_WEIGHTS].tolist() == [[1, 0], [0, 1]] and not step[SKIP_GATE].any()


def test_a_denoiser_without_a_gate_is_fed_none() -> None:
    assert guidance_feeds(StepContract(), 1, 3.0, [0.0] * 2)[0].keys() == {GUIDANCE_WEIGHTS}


def test_without_guidance_there_is_one_row_per_sample() -> None:
    assert guidance_feeds(GATED, 2, 1.0, [0.0])[0][GUIDANCE_WEIGHTS].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("mode", "scale", "guided"),
    [
        (GuidanceMode.CFG, 4.5, True),
        (GuidanceMode.CFG, 1.0, False),
        (GuidanceMode.EMBEDDED, 4.5, False),
        (GuidanceMode.NONE, 4.5, False),
    ],
)
def test_only_classifier_free_guidance_has_unconditional_rows(
    mode: GuidanceMode, scale: float, guided: bool
) -> None:
    contract = StepContract(guidance=mode)
    assert is_guided(contract, scale) is guided
    weights = guidance_feeds(contract, 3, scale, [0.0])[0][GUIDANCE_WEIGHTS]
    assert weights.shape == (3, 6 if guided else 3)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


def test_an_embedded_guidance_scale_is_fed_to_every_sample() -> None:
    contract = StepContract(guidance=GuidanceMode.EMBEDDED)
    for feeds in guidance_feeds(contract, 2, 4.5, [0.0] * 3):
        assert feeds[GUIDANCE].tolist() == [4.5, 4.5] and feeds[GUIDANCE].dtype == np.float32
