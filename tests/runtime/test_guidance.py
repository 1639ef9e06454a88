"""Guidance as weights of rows: what diffusers adds up, and on which steps."""

from __future__ import annotations

import numpy as np
import pytest

from ditc.runtime.bundle.manifest import SkipLayerGuidance
from ditc.runtime.denoise import GUIDANCE_WEIGHTS, SKIP_GATE
from ditc.runtime.guidance import guidance_feeds, guidance_weights

SKIP = SkipLayerGuidance(layers=(7, 8, 9), scale=2.8, start=0.01, stop=0.2)


def test_the_weights_add_up_to_what_diffusers_computes() -> None:
    batch, g, s = 2, 5.0, 2.8
    outputs = np.random.default_rng(0).standard_normal((3 * batch, 7)).astype(np.float32)
    u, c, k = np.split(outputs, 3)
    assert np.allclose(guidance_weights(batch, 1.0) @ c, c)
    assert np.allclose(guidance_weights(batch, g) @ outputs[: 2 * batch], u + g * (c - u), atol=1e-5)
    wanted = u + g * (c - u) + (c - k) * s
    assert np.allclose(guidance_weights(batch, g, s) @ outputs, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "start", "stop", "inside"),
    [
        (28, 0.01, 0.2, [1, 2, 3, 4, 5]),
        (20, 0.0, 0.2, [1, 2, 3]),  # both ends are left out: steps 0 and 4 lie on them
        (5, 0.2, 0.8, [2, 3]),
        (10, 0.5, 0.5, []),
    ],
)
def test_the_third_row_is_there_in_diffusers_window_only(
    steps: int, start: float, stop: float, inside: list[int]
) -> None:
    skip = SkipLayerGuidance(layers=(1,), scale=2.0, start=start, stop=stop)
    rows = [f[GUIDANCE_WEIGHTS].shape[1] for f in guidance_feeds(1, 3.0, skip, steps, gated=True)]
    assert [index for index, count in enumerate(rows) if count == 3] == inside
    assert len(rows) == steps and set(rows) <= {2, 3}


def test_only_the_third_rows_skip_layers() -> None:
    inside = guidance_feeds(2, 3.0, SKIP, 28, gated=True)[3]
    assert inside[SKIP_GATE].tolist() == [0, 0, 0, 0, 1, 1]
    outside = guidance_feeds(2, 3.0, SKIP, 28, gated=True)[20]
    assert outside[SKIP_GATE].tolist() == [0, 0, 0, 0]


def test_a_denoiser_without_a_gate_is_fed_none() -> None:
    assert guidance_feeds(1, 3.0, None, 2, gated=False)[0].keys() == {GUIDANCE_WEIGHTS}


def test_without_guidance_there_is_one_row_a_sample_whatever_is_skipped() -> None:
    assert guidance_feeds(2, 1.0, SKIP, 28, gated=True)[3][GUIDANCE_WEIGHTS].shape == (2, 2)
