"""Guidance as weights of rows: the same sums as in diffusers, on the same steps."""

from __future__ import annotations

import numpy as np
import pytest

from ditc.runtime.bundle.manifest import SkipLayerGuidance
from ditc.runtime.guidance import guidance_feeds, guidance_weights, is_guided
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
    rows = [f[GUIDANCE_WEIGHTS].shape[1] for f in guidance_feeds(GATED, 1, 3.0, skip, steps)]
    assert [index for index, count in enumerate(rows) if count == 3] == inside
    assert len(rows) == steps and set(rows) <= {2, 3}


def test_only_the_third_rows_skip_layers() -> None:
    inside = guidance_feeds(GATED, 2, 3.0, SKIP, 28)[3]
    assert inside[SKIP_GATE].tolist() == [0, 0, 0, 0, 1, 1]
    outside = guidance_feeds(GATED, 2, 3.0, SKIP, 28)[20]
    assert outside[SKIP_GATE].tolist() == [0, 0, 0, 0]


def test_a_denoiser_without_a_gate_is_fed_none() -> None:
    assert guidance_feeds(StepContract(), 1, 3.0, None, 2)[0].keys() == {GUIDANCE_WEIGHTS}


def test_without_guidance_there_is_one_row_per_sample_and_none_skips_layers() -> None:
    assert guidance_feeds(GATED, 2, 1.0, SKIP, 28)[3][GUIDANCE_WEIGHTS].shape == (2, 2)


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
    weights = guidance_feeds(contract, 3, scale, None, 1)[0][GUIDANCE_WEIGHTS]
    assert weights.shape == (3, 6 if guided else 3)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


def test_an_embedded_guidance_scale_is_fed_to_every_sample() -> None:
    contract = StepContract(guidance=GuidanceMode.EMBEDDED)
    for feeds in guidance_feeds(contract, 2, 4.5, None, 3):
        assert feeds[GUIDANCE].tolist() == [4.5, 4.5] and feeds[GUIDANCE].dtype == np.float32
