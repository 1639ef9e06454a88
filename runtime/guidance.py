"""Guidance as data: the rows that a step runs on, and how much each of them counts.

    pred[b] = sum_r weights[b,r] * network(row r)

A sample has up to three rows, in this order: unconditional, conditional, and conditional with some of the network's
layers skipped. Without guidance there is only the conditional one. The third comes last because only some steps run on
it: a step takes the first rows, as many as it has weights for.

Sources: classifier-free guidance (arXiv 2207.12598), with diffusers' guidance_scale; skip-layer guidance as diffusers
0.42.1 computes it: u + g*(c - u) + s*(c - k) has the weights (1 - g, g + s, -s).
"""

# B samples, R rows

from __future__ import annotations

import numpy as np

from ditc.runtime.bundle.manifest import SkipLayerGuidance
from ditc.runtime.denoise import GUIDANCE_WEIGHTS, SKIP_GATE
from ditc.runtime.session import Array


def guidance_feeds(
    batch: int,
    guidance_scale: float,
    skip: SkipLayerGuidance | None,
    num_inference_steps: int,
    *,
    gated: bool,
) -> list[dict[str, Array]]:
    """What the denoiser is fed for guidance, step by step.

    Args:
        guidance_scale: 1 or less draws without guidance, of either kind.
        skip: None where skip-layer guidance is off.
        gated: whether the denoiser has a gate that tells it which rows skip layers.
    """
    steps = []
    for index in range(num_inference_steps):
        weights = guidance_weights(batch, guidance_scale, _skip_scale(skip, index, num_inference_steps))
        steps.append({GUIDANCE_WEIGHTS: weights, **({SKIP_GATE: skip_gate(weights)} if gated else {})})
    return steps


def guidance_weights(batch: int, guidance_scale: float, skip_scale: float | None = None) -> Array:
    """(B,R) fp32 for one step; R = B, 2B or 3B.

    Args:
        skip_scale: of skip-layer guidance in this step; None where it is off.
    """
    one = np.eye(batch, dtype=np.float32)
    if guidance_scale <= 1:
        return one
    g = np.float32(guidance_scale)
    if skip_scale is None:
        return np.concatenate([(1 - g) * one, g * one], axis=1)
    s = np.float32(skip_scale)
    return np.concatenate([(1 - g) * one, (g + s) * one, -s * one], axis=1)


def skip_gate(weights: Array) -> Array:
    """(R,) fp32: 1 for rows that skip layers, the third of each sample."""
    batch, rows = weights.shape
    gate = np.zeros(rows, np.float32)
    gate[2 * batch :] = 1
    return gate


def _skip_scale(skip: SkipLayerGuidance | None, index: int, steps: int) -> float | None:
    """None outside the window, whose ends are outside."""
    if skip is None or not steps * skip.start < index < steps * skip.stop:
        return None
    return skip.scale
