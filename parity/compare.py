"""Compare two tensors: are both finite and not constant, how far are they apart, and in which element most?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditc.parity.results import Element
from ditc.runtime.errors import NumericsError
from ditc.runtime.metrics import is_flat, relative_l2, widened
from ditc.runtime.session import Array


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one tensor's comparison says.

    Attributes:
        error: relative L2; NaN where the shapes differ or the candidate is not finite.
        problem: set when the error is not meaningful: another shape, NaN or Inf, or one value everywhere although
            the reference varies.
        finite: whether the candidate is free of NaN and Inf.
    """

    error: float
    worst: Element
    problem: str = ""
    finite: bool = True


def check_reference(name: str, reference: Array) -> Array:
    """The reference as floats.

    Raises:
        NumericsError: the reference has NaN or Inf. A result that agrees with an overflow would prove nothing.
    """
    reference = widened(reference)
    bad = reference.size - int(np.isfinite(reference).sum())
    if bad:
        raise NumericsError(
            f"the reference itself has {bad} of {reference.size} values that are NaN or Inf in {name}",
            hint="parity against it would prove nothing: check the checkpoint, or take a reference in fp32",
        )
    return reference


def compare(name: str, candidate: Array, reference: Array) -> Comparison:
    """Compare one tensor.

    A reference that is one constant, such as the bias of a text without padding, is compared by the same error: each
    value of the candidate must be near that constant, and near zero absolutely where the constant is zero.

    Raises:
        NumericsError: the reference is not finite.
    """
    reference, candidate = check_reference(name, reference), widened(candidate)
    if candidate.shape != reference.shape:
        element = Element(tensor=name, index=(), candidate=float("nan"), reference=float("nan"))
        return Comparison(
            float("nan"),
            element,
            f"{name} has shape {candidate.shape}, but the reference has {reference.shape}",
        )
    finite = np.isfinite(candidate)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        worst = Element(tensor=name, index=at, candidate=float(candidate[at]), reference=float(reference[at]))
        problem = f"{name} has {int((~finite).sum())} NaN or Inf values"
        return Comparison(float("nan"), worst, problem, finite=False)
    worst = worst_element(name, candidate, reference)
    error = relative_l2(candidate, reference)
    if is_flat(candidate) and not is_flat(reference):
        return Comparison(error, worst, f"{name} has one value only, {float(candidate.flat[0]):.6g}")
    return Comparison(error, worst)


def worst_element(name: str, candidate: Array, reference: Array) -> Element:
    """The element in which the two differ most."""
    difference = np.abs(candidate.astype(np.float64) - reference.astype(np.float64))
    at = np.unravel_index(int(difference.argmax()), difference.shape) if difference.size else ()
    index = tuple(int(i) for i in at)
    return Element(
        tensor=name, index=index, candidate=float(candidate[index]), reference=float(reference[index])
    )
