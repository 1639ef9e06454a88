"""The noise that torch's CPU generator draws, in numpy, so that equal seeds give equal starting latents.

torch 2.13 (aten/src/ATen/core/MT19937RNGEngine.h, DistributionsHelper.h and native/cpu/DistributionTemplates.h) seeds a
Mersenne Twister with the low 32 bits of the seed, and uses the Box-Muller transform in one of two ways:

    16 values or more   float32 uniforms of 24 bits fill the tensor and are transformed in place in groups of 16: the
                        cosines of 8 pairs, then their sines. If the size is not a multiple of 16, the last 16 values
                        are drawn again.
    fewer than 16       float64 pairs. The second normal of a pair is kept for the next draw of this kind.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.errors import UsageError

GROUP = 16
_TWO_PI = np.float32(2 * math.pi)


class Generator:
    """The normal values of torch.Generator("cpu").manual_seed(seed). Each draw continues where the last one ended.

    Args:
        seed: from -2**63 to 2**64 - 1, like torch's.

    Raises:
        UsageError: the seed is outside that range.
    """

    def __init__(self, seed: int) -> None:
        if not -(2**63) <= seed < 2**64:
            raise UsageError(f"seed is {seed}", hint="pass a seed from -2**63 to 2**64 - 1")
        self.seed = seed
        self._engine = np.random.MT19937()
        # RandomState seeds with init_genrand of the reference Mersenne Twister, as torch does. MT19937(seed) would hash
        # the seed first.
        state: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
        self._engine.state = state
        self._second_normal: float | None = None

    @property
    def source(self) -> object:
        """What holds the state of the stream. Two generators with one source draw from one stream."""
        return self

    def copy(self) -> Generator:
        """A generator that draws the same values from here on."""
        other = Generator(self.seed)
        other._engine.state = self._engine.state
        other._second_normal = self._second_normal
        return other

    def skip(self, count: int) -> None:
        """Go past `count` of the values that `uniforms` returns."""
        self._engine.random_raw(count, output=False)

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """torch.randn(shape, generator=...) to within 1e-6; log, sin and cos of torch and numpy differ by one ulp.

        On a CPU without AVX2, torch rounds the angle in another place, and the difference is up to 4e-6.
        """
        size = math.prod(shape)
        values = self._fill(size) if size >= GROUP else self._one_by_one(size)
        return values.reshape(tuple(shape))

    def _fill(self, size: int) -> NDArray[np.float32]:
        whole = size - size % GROUP
        values = np.empty(size, np.float32)
        uniforms = self.uniforms(size)
        values[:whole] = box_muller(uniforms[:whole])
        if whole < size:
            values[-GROUP:] = box_muller(self.uniforms(GROUP))
        return values

    def uniforms(self, count: int) -> NDArray[np.float32]:
        """The float32 values in [0,1) from which a tensor of 16 values or more is made."""
        bits = self._engine.random_raw(count) & np.uint64(0xFFFFFF)
        return bits.astype(np.float32) * np.float32(2**-24)

    def _one_by_one(self, count: int) -> NDArray[np.float32]:
        return np.array([self._normal() for _ in range(count)], np.float32)

    def _normal(self) -> float:
        if self._second_normal is not None:
            second, self._second_normal = self._second_normal, None
            return second
        angle = 2 * math.pi * self._uniform64()
        radius = math.sqrt(-2 * math.log1p(-self._uniform64()))
        self._second_normal = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform64(self) -> float:
        high, low = self._engine.random_raw(2)
        return float(((int(high) << 32) | int(low)) & (2**53 - 1)) * 2**-53


class TorchGenerator(Generator):
    """A torch.Generator of the caller, on any device. It draws with the caller's torch, since ditc imports none."""

    def __init__(self, generator: Any) -> None:
        self.seed = generator.initial_seed()
        self._torch, self._generator = sys.modules["torch"], generator

    @property
    def source(self) -> object:
        return self._generator

    def copy(self) -> Generator:
        """Raises NotImplementedError: what torch draws in parts on other devices differs from what it draws at once."""
        raise NotImplementedError("the caller's torch draws all values at once")

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """torch.randn(shape, generator=...), which advances the caller's generator."""
        generator, torch = self._generator, self._torch
        drawn = torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)
        values: NDArray[np.float32] = drawn.cpu().numpy()
        return values


def is_torch_generator(value: object) -> bool:
    """Whether this is a torch.Generator. A process that has not imported torch has none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Generator)


def box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normal values from uniforms (16 n,). Each operation is rounded to float32, as in torch."""
    pairs = uniforms.reshape(-1, 2, GROUP // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - pairs[:, 0]))
    angle = _TWO_PI * pairs[:, 1]
    normals = np.empty_like(pairs)
    normals[:, 0] = radius * np.cos(angle)
    normals[:, 1] = radius * np.sin(angle)
    return normals.reshape(-1)


def randn_latents(shape: Sequence[int], generator: Generator | Sequence[Generator]) -> NDArray[np.float32]:
    """Starting latents (B, ...), as diffusers' randn_tensor draws them.

    Args:
        generator: one for the whole batch, or a sequence of B generators, one per picture.

    Raises:
        UsageError: the length of the sequence is not B.
    """
    if isinstance(generator, Generator):
        return generator.randn(shape)
    if len(generator) != shape[0]:
        raise UsageError(
            f"the number of generators is {len(generator)}, but the number of pictures is {shape[0]}",
            hint="pass one generator for all pictures, or one per picture",
        )
    return np.concatenate([one.randn((1, *shape[1:])) for one in generator])
