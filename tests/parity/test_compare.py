"""One tensor beside its reference: constants on either side, NaN, and another shape."""

from __future__ import annotations

import numpy as np
import pytest

from ditc.parity.compare import compare
from ditc.runtime.denoise import STATS
from ditc.runtime.errors import NumericsError

VARIED = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize("constant", [0.0, -10000.0])
def test_a_reference_of_one_value_is_compared_by_its_values(constant: float) -> None:
    """The bias of a text without padding: right where the candidate has it too, and wrong at one other value."""
    bias = np.full((2, 1, 6), constant, np.float32)
    same = compare("text_bias", bias.copy(), bias)
    assert (same.error, same.problem) == (0.0, "")
    other = bias.copy()
    other[1, 0, 3] += 10000.0
    found = compare("text_bias", other, bias)
    assert found.error > 0.1 and found.worst.index == (1, 0, 3)


def test_another_constant_than_the_references_is_an_error() -> None:
    found = compare("text_bias", np.zeros((2, 1, 6), np.float32), np.full((2, 1, 6), -10000.0, np.float32))
    assert found.error == 1.0


@pytest.mark.parametrize("name", ["text_bias", STATS, "x0"])
def test_one_value_where_the_reference_varies_is_a_problem_whatever_the_tensor(name: str) -> None:
    found = compare(name, np.zeros_like(VARIED), VARIED)
    assert found.problem == f"{name} has one value only, 0" and found.finite


def test_values_that_are_not_finite_and_another_shape_have_no_error() -> None:
    spoiled = VARIED.copy()
    spoiled[1, 2] = np.nan
    found = compare("x0", spoiled, VARIED)
    assert np.isnan(found.error) and not found.finite and found.worst.index == (1, 2)
    found = compare("x0", VARIED[:2], VARIED)
    assert np.isnan(found.error) and found.finite and "(2, 4)" in found.problem


def test_a_reference_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericsError, match="1 of 12 values that are NaN or Inf in x0"):
        compare("x0", VARIED, np.where(VARIED == 1, np.inf, VARIED))
