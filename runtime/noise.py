"""The noise of many pictures, made for some of them at a time, and bit for bit what one draw for all of them gives.

A draw of torch depends on its size: its last 16 values are drawn again if the size is not a multiple of 16
(runtime/rng.py). So drawing less would give other noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ditc.runtime.rng import GROUP, Generator, TorchGenerator, box_muller, randn_latents
from ditc.runtime.session import Array


class Parts(Protocol):
    """An array (B, ...) that is taken in parts, from its first entries to its last ones."""

    def take(self, count: int) -> Array:
        """The next `count` entries."""
        ...


class Whole:
    """An array that exists as a whole."""

    def __init__(self, array: Array) -> None:
        self._array, self._taken = array, 0

    def take(self, count: int) -> Array:
        self._taken += count
        return self._array[self._taken - count : self._taken]


class AfterFirstFrame:
    """Noise of videos (B,C,F-1,H,W), with a first frame of zeros before it: (B,C,F,H,W)."""

    def __init__(self, others: Parts) -> None:
        self._others = others

    def take(self, count: int) -> Array:
        others = self._others.take(count)
        return np.concatenate([np.zeros_like(others[:, :, :1]), others], axis=2)


def noise_parts(shape: Sequence[int], generator: Generator | Sequence[Generator]) -> Parts:
    """What `randn_latents` draws. A single generator has gone past all of it when this returns.

    Raises:
        UsageError: the length of a sequence of generators is not B.
    """
    if not isinstance(generator, Generator):
        sources = {id(one.source) for one in generator}
        if len(generator) == shape[0] == len(sources):
            return _OneByOne(shape, generator)
    elif not isinstance(generator, TorchGenerator) and math.prod(shape) >= GROUP:
        return _Stream(shape, generator)
    return Whole(randn_latents(shape, generator))


class _OneByOne:
    """Noise of pictures that have a generator each."""

    def __init__(self, shape: Sequence[int], generators: Sequence[Generator]) -> None:
        self._entry, self._rest = tuple(shape[1:]), iter(generators)

    def take(self, count: int) -> Array:
        generators = [next(self._rest) for _ in range(count)]
        return randn_latents((count, *self._entry), generators)


class _Stream:
    """Noise from one generator. Values are made in groups of 16, of which some are kept for the next part."""

    def __init__(self, shape: Sequence[int], generator: Generator) -> None:
        self._entry, size = tuple(shape[1:]), math.prod(shape)
        self._generator = generator.copy()
        self._left, self._kept = size, np.empty(0, np.float32)
        generator.skip(size)
        self._tail = box_muller(generator.uniforms(GROUP)) if size % GROUP else self._kept

    def take(self, count: int) -> Array:
        size = count * math.prod(self._entry)
        missing = max(size - len(self._kept), 0)
        made = box_muller(self._generator.uniforms(missing + -missing % GROUP))
        values = np.concatenate([self._kept, made])
        part, self._kept = values[:size], values[size:]
        redrawn = min(
            size, size - self._left + len(self._tail)
        )  # how many of the last values are in this part
        self._left -= size
        if redrawn > 0:
            start = len(self._tail) - self._left - redrawn
            part[size - redrawn :] = self._tail[start : start + redrawn]
        return part.reshape(count, *self._entry)
