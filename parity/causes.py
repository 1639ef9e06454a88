"""Known patterns of failure, and how to recognise them: each cause is tried out on the numbers, not guessed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ditc.runtime import step_contract
from ditc.runtime.metrics import relative_l2, widened
from ditc.runtime.session import Array

FP16_MAX = 65504.0
SAME = 1e-4


def schedule_causes(sigmas: Array, reference: Array) -> tuple[str, ...]:
    """Why two schedules (N+1,) differ: another flow shift, or rows off by one."""
    if sigmas.shape != reference.shape:
        return (f"{len(sigmas) - 1} steps where the reference takes {len(reference) - 1}",)
    for offset, word in ((1, "later"), (-1, "earlier")):
        rolled = np.roll(sigmas, offset)
        inner = slice(1, -1)
        if np.allclose(rolled[inner], reference[inner], rtol=1e-5):
            return (f"the sigma table is off by one: each row is one step too {word}",)
    ratio = _shift_ratio(sigmas, reference)
    if ratio is not None:
        return (f"shifted sigmas: the flow shift is {ratio:.4g} times the reference's",)
    return ("the sigmas differ in no known way: compare scheduler_config.json with the manifest",)


def feed_causes(
    candidate: Mapping[str, Array], reference: Mapping[str, Array], first_step: bool
) -> tuple[str, ...]:
    """Why a step fails although the denoiser is right: what the pipeline feeds it."""
    found = []
    for name, wanted in reference.items():
        got = widened(candidate[name])
        wanted = widened(wanted)
        if got.shape != wanted.shape:
            found.append(f"{name} is {got.shape}, the reference feeds {wanted.shape}")
        elif got.dtype.kind != "f":
            if not np.array_equal(got, wanted):
                found.append(f"{name} differs: {got.ravel()[:6]} instead of {wanted.ravel()[:6]}")
        elif not relative_l2(got, wanted) <= SAME:
            found.append(_feed_cause(name, got, wanted, first_step))
    return tuple(found)


def range_causes(candidate_finite: bool, reference_amax: float) -> tuple[str, ...]:
    """NaN and Inf, by what the reference's range allows in fp16."""
    if candidate_finite:
        return ()
    if reference_amax > FP16_MAX:
        return (f"fp16 overflow: the reference reaches {reference_amax:.3g}, fp16 ends at {FP16_MAX:.0f}",)
    return (
        f"NaN or Inf although the reference stays at {reference_amax:.3g}: a division by zero, or a bad input",
    )


def _feed_cause(name: str, got: Array, wanted: Array, first_step: bool) -> str:
    if name == step_contract.HISTORY and first_step and not wanted.any():
        return "stale history: x0 of an earlier request is fed to the first step, whose history must be zeros"
    if name == step_contract.GUIDANCE_WEIGHTS:
        return _guidance_cause(got, wanted)
    if name in (step_contract.TIMESTEP, step_contract.COEFFICIENTS):
        first, theirs = np.round(got.ravel()[:3], 4), np.round(wanted.ravel()[:3], 4)
        return f"shifted sigmas: {name} is {first}, the reference's is {theirs}"
    half = wanted.shape[0] // 2
    if half and relative_l2(np.concatenate([got[half:], got[:half]]), wanted) <= SAME:
        return f"swapped CFG order: the conditional and unconditional rows of {name} are exchanged"
    if name.endswith(("bias", "mask")) and not got.any() and wanted.any():
        return f"missing mask: {name} hides nothing, padding takes part in the attention"
    return f"{name} differs (relative L2 {relative_l2(got, wanted):.2g})"


def _guidance_cause(got: Array, wanted: Array) -> str:
    half = wanted.shape[1] // 2
    if half and relative_l2(np.concatenate([got[:, half:], got[:, :half]], axis=1), wanted) <= SAME:
        return "swapped CFG order: the guidance weights of conditional and unconditional rows are exchanged"
    if half:
        return f"the guidance scale is {got[0, half]:.4g}, {wanted[0, half]:.4g} was asked for"
    return "the guidance weights differ"


def _shift_ratio(sigmas: Array, reference: Array) -> float | None:
    """s with sigma = s*r / (1 + (s-1)*r): the one parameter of a flow shift, if one value fits all steps."""
    inner = (reference > 1e-6) & (reference < 1 - 1e-6) & (sigmas > 1e-6) & (sigmas < 1 - 1e-6)
    if not inner.any():
        return None
    odds = (sigmas[inner] / (1 - sigmas[inner])) / (reference[inner] / (1 - reference[inner]))
    return float(odds.mean()) if np.allclose(odds, odds.mean(), rtol=1e-2) else None
