"""Noise that is drawn in parts is that of one draw for all pictures, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ditc.runtime.errors import UsageError
from ditc.runtime.noise import noise_parts
from ditc.runtime.rng import Generator, TorchGenerator, randn_latents


@pytest.mark.parametrize("entry", [(1,), (3,), (7,), (4, 4), (5, 5), (8, 32, 32), (3, 9, 11)])
@pytest.mark.parametrize("parts", [(9,), (4, 4, 1), (1,) * 9, (2, 7), (8, 1)])
def test_parts_equal_the_whole_and_the_generator_goes_on_behind_it(
    entry: tuple[int, ...], parts: tuple[int, ...]
) -> None:
    shape = (9, *entry)
    for make in (Generator, lambda seed: TorchGenerator(torch.Generator().manual_seed(seed))):
        one, other = make(3), make(3)
        for _ in range(2):  # the second draw shows where the first one left the generator
            whole = randn_latents(shape, one)
            drawn = noise_parts(shape, other)
            np.testing.assert_array_equal(np.concatenate([drawn.take(count) for count in parts]), whole)


def test_a_generator_per_picture_draws_its_picture() -> None:
    whole = randn_latents((4, 3, 5), [Generator(seed) for seed in range(4)])
    drawn = noise_parts((4, 3, 5), [Generator(seed) for seed in range(4)])
    np.testing.assert_array_equal(np.concatenate([drawn.take(3), drawn.take(1)]), whole)


def test_a_generator_that_two_pictures_share_goes_on_in_order() -> None:
    def drawn(make: type) -> list[np.ndarray]:
        own, torchs = Generator(1), torch.Generator().manual_seed(1)
        shared = [own, own] if make is Generator else [TorchGenerator(torchs), TorchGenerator(torchs)]
        first, second = (noise_parts((2, 16), shared) for _ in range(2))  # of two steps
        return [np.concatenate([parts.take(1), parts.take(1)]) for parts in (first, second)]

    for ours, theirs in zip(drawn(Generator), drawn(TorchGenerator), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_number_of_generators_is_checked_before_the_first_part() -> None:
    with pytest.raises(UsageError, match="number of generators is 2"):
        noise_parts((3, 4), [Generator(0), Generator(1)])
