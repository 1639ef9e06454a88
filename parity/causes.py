"""Known causes of failures. Each is tested on the numbers: a cause is named only if it explains them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ditc.runtime import step_contract
from ditc.runtime.metrics import relative_l2, widened
from ditc.runtime.session import Array

FP16_MAX = 65504.0
SAME = 1e-4


def schedule_causes(sigmas: Array, reference: Array) -> tuple[str, ...]:
    """Why two schedules of sigmas (N+1,) differ: another number of steps, rows off by one, or another flow shift."""
    if sigmas.shape != reference.shape:
        return (f"the schedule has {len(sigmas) - 1} steps, but the reference's has {len(reference) - 1}",)
    for offset, which in ((1, "next"), (-1, "previous")):
        rolled = np.roll(sigmas, offset)
        inner = slice(1, -1)
        if np.allclose(rolled[inner], reference[inner], rtol=1e-5):
            return (f"the sigma table is off by one: each row has the sigma of the {which} step",)
    ratio = _shift_ratio(sigmas, reference)
    if ratio is not None:
        return (f"shifted sigmas: the flow shift is {ratio:.4g} times the reference's",)
    return ("the sigmas differ in no known pattern: compare scheduler_config.json with the manifest",)


def feed_causes(
    candidate: Mapping[str, Array],
    reference: Mapping[str, Array],
    first_step: bool,
    before: Mapping[str, Array] | None = None,
) -> tuple[str, ...]:
    """How the inputs that the pipelines feed to the denoiser differ, by input.

    Args:
        before: what the candidate's pipeline feeds to the step before.

    Returns:
        Nothing if they agree: then the denoiser itself is wrong.
    """
    found = []
    for name, wanted in reference.items():
        got = widened(candidate[name])
        wanted = widened(wanted)
        if got.shape != wanted.shape:
            found.append(f"{name} has shape {got.shape}, but the reference feeds {wanted.shape}")
        elif got.dtype.kind != "f":
            if not np.array_equal(got, wanted):
                found.append(
                    f"{name} differs: it begins with {got.ravel()[:6]}, the reference's with {wanted.ravel()[:6]}"
                )
        elif not relative_l2(got, wanted) <= SAME:
            found.append(_feed_cause(name, got, wanted, first_step, before or {}))
    return tuple(found)


def edit_causes(
    steps: int, reference_steps: int, mask: Array | None = None, reference_mask: Array | None = None
) -> tuple[str, ...]:
    """Why two sides edit a picture differently: where their loops begin, and which cells inpainting draws anew.

    Args:
        steps, reference_steps: how many steps each side does.
        mask, reference_mask: (B,1,h,w), 1 where inpainting draws anew; None without inpainting.
    """
    found = []
    if steps != reference_steps:
        off = abs(steps - reference_steps)
        found.append(
            f"strength is off by {'one step' if off == 1 else f'{off} steps'}: the loop does {steps} steps, but the "
            f"reference's does {reference_steps}"
        )
    if mask is None or reference_mask is None or np.array_equal(mask, reference_mask):
        return tuple(found)
    if np.array_equal(1 - mask, reference_mask):
        found.append("mask inverted: the picture is kept where it should be drawn anew, and the reverse")
    elif mask.shape != reference_mask.shape:
        found.append(f"the mask has shape {mask.shape}, but the reference's has {reference_mask.shape}")
    else:
        wrong = int((mask != reference_mask).sum())
        found.append(f"the mask differs in {wrong} of {mask.size} latent cells")
    return tuple(found)


def kept_causes(latents: Array, picture: Array, reference_mask: Array) -> tuple[str, ...]:
    """Whether latents (B,C,h,w) after a step of inpainting hold the picture inside of the mask instead of outside.

    Args:
        picture: (B,C,h,w), the encoded picture, with the noise that is left after the step.
    """
    inside = np.broadcast_to(reference_mask > 0.5, latents.shape)
    kept, found = picture[inside], latents[inside]
    scale = float(kept @ found) / max(float(kept @ kept), 1e-12)  # the units of the sampler's latents
    if not relative_l2(found, scale * kept) <= SAME:
        return ()
    return ("mask inverted: the picture is kept where it should be drawn anew",)


def explains(mistaken: Array, got: Array, reference: Array) -> bool:
    """Whether a mistake made on purpose gives what the candidate got: nine tenths of its error at least."""
    return relative_l2(got, mistaken) <= min(SAME, relative_l2(got, reference) / 10)


def frame_causes(latents: Array, before: Array, held: Array) -> tuple[str, ...]:
    """Whether frames of latents (B,C,F,h,w) that are held have changed.

    Args:
        held: (B,F), 1 where a frame is held.
    """
    of_frames = np.moveaxis(latents, 2, 1)[held > 0.5], np.moveaxis(before, 2, 1)[held > 0.5]
    if relative_l2(*of_frames) <= SAME:
        return ()
    frames = sorted({int(frame) for _, frame in np.argwhere(held > 0.5)})
    return (f"the first frame is not held: latent frames {frames} change, but must stay as they are",)


def range_causes(candidate_finite: bool, reference_amax: float) -> tuple[str, ...]:
    """Why the candidate has NaN or Inf, judged by the largest magnitude in the reference; empty if it is finite."""
    if candidate_finite:
        return ()
    if reference_amax > FP16_MAX:
        return (
            f"fp16 overflow: the reference reaches {reference_amax:.3g}, but the largest fp16 number is {FP16_MAX:.0f}",
        )
    return (
        f"NaN or Inf although the reference only reaches {reference_amax:.3g}: a division by zero or a bad input",
    )


def _feed_cause(name: str, got: Array, wanted: Array, first_step: bool, before: Mapping[str, Array]) -> str:
    if name == step_contract.HISTORY and first_step and not wanted.any():
        return "stale history: x0 of an earlier request is fed to the first step, whose history must be zeros"
    if name == step_contract.GUIDANCE_WEIGHTS:
        return _guidance_cause(got, wanted)
    if name == step_contract.SKIP_GATE:
        found, right = np.flatnonzero(got > 0.5).tolist(), np.flatnonzero(wanted > 0.5).tolist()
        return f"wrong gate: rows {found} skip a part of the network, but it should be rows {right}"
    if name == step_contract.HELD:
        found, right = (np.flatnonzero((x > 0.5).any(axis=0)).tolist() for x in (got, wanted))
        return f"the first frame is not held: latent frames {found} are, but it should be {right}"
    if name == step_contract.GUIDANCE:
        return f"the embedded guidance scale is {got[0]:.4g}, but {wanted[0]:.4g} was requested"
    if name == step_contract.NOISE:
        reused = name in before and np.array_equal(got, before[name])
        return (
            "noise reused between steps: this step gets that of the step before"
            if reused
            else ("the noise is not what the request's random stream gives for this step")
        )
    if name in (step_contract.TIMESTEP, step_contract.COEFFICIENTS):
        ours, theirs = np.round(got.ravel()[:3], 4), np.round(wanted.ravel()[:3], 4)
        return f"shifted sigmas: {name} begins with {ours}, the reference's with {theirs}"
    half = wanted.shape[0] // 2
    if half and relative_l2(np.concatenate([got[half:], got[:half]]), wanted) <= SAME:
        return f"swapped CFG order: the conditional and unconditional rows of {name} are exchanged"
    if name.endswith(("bias", "mask")) and not got.any() and wanted.any():
        return f"missing mask: {name} masks nothing, so padding takes part in the attention"
    return f"{name} differs (relative L2 {relative_l2(got, wanted):.2g})"


def _guidance_cause(got: Array, wanted: Array) -> str:
    """Which scale explains other weights (B,R) than wanted, of the forms that runtime/guidance.py lists."""
    batch, rows = wanted.shape
    if rows == 3 * batch or (rows == 2 * batch and wanted[0, 0] > 1):  # the last rows are gated
        ours, theirs = -got[0, -batch], -wanted[0, -batch]
        if abs(ours - theirs) > SAME * max(abs(theirs), 1):
            return f"the scale of the gated rows is {ours:.4g}, but {theirs:.4g} was requested"
        return f"the guidance scale is {1 - got[0, 0]:.4g}, but {1 - wanted[0, 0]:.4g} was requested"
    half = rows // 2
    if half and relative_l2(np.concatenate([got[:, half:], got[:, :half]], axis=1), wanted) <= SAME:
        return "swapped CFG order: the guidance weights of conditional and unconditional rows are exchanged"
    if half:
        return f"the guidance scale is {got[0, half]:.4g}, but {wanted[0, half]:.4g} was requested"
    return "the guidance weights differ"


def _shift_ratio(sigmas: Array, reference: Array) -> float | None:
    """The flow shift s with sigma = s*r / (1 + (s-1)*r), r the reference's sigma; None if no s fits all steps.

    That is sigma/(1-sigma) = s * r/(1-r): a shift multiplies the odds.
    """
    inner = (reference > 1e-6) & (reference < 1 - 1e-6) & (sigmas > 1e-6) & (sigmas < 1 - 1e-6)
    if not inner.any():
        return None
    odds = (sigmas[inner] / (1 - sigmas[inner])) / (reference[inner] / (1 - reference[inner]))
    return float(odds.mean()) if np.allclose(odds, odds.mean(), rtol=1e-2) else None
