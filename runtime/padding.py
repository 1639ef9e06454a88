"""Rows of texts of different lengths: shorter ones are filled up with what a token holds that the mask hides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ditc.runtime.session import Array, Tensor, to_numpy


@dataclass(frozen=True, slots=True)
class Padding:
    """How one tensor of a text's conditioning grows: along which axis, and with which value."""

    axis: int
    value: float


def text_length(row: Mapping[str, Tensor], padding: Mapping[str, Padding]) -> int:
    """The number of tokens of conditioning whose tensors can be filled up."""
    name = next(iter(padding))
    return int(row[name].shape[padding[name].axis])


def lengthened(row: Mapping[str, Tensor], padding: Mapping[str, Padding], length: int) -> dict[str, Array]:
    """The conditioning with `length` tokens. Tensors that have as many already are not copied."""
    filled = {}
    for name, tensor in row.items():
        array = to_numpy(tensor)
        if (how := padding.get(name)) is not None and array.shape[how.axis] < length:
            widths = [(0, 0)] * array.ndim
            widths[how.axis] = (0, length - array.shape[how.axis])
            array = np.pad(array, widths, constant_values=how.value)
        filled[name] = array
    return filled
