"""The generator, compared with torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from ditc.runtime.errors import UsageError
from ditc.runtime.rng import Generator, randn_latents

# torch's AVX2 log, sin and cos are an ulp off numpy's; the largest normals are 5.8, with an ulp of 4.8e-7. Without AVX2
# torch multiplies by 2 pi in float64: the angle is an ulp of 6.3 off, 4.8e-7, and a normal 5.8 times that.
BOUND = 4e-6 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 1e-6
SEEDS = (0, 1, 42, 5489, 2**31, 2**32 - 1, 2**32 + 7, 2**63 + 12345, 2**64 - 1, -1, -(2**63))
SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 100, 623, 624, 625, 1000, 4096)


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_size_and_seed_equals_torch(seed: int) -> None:
    for size in SIZES:
        reference = torch.randn(size, generator=torch_generator(seed)).numpy()
        np.testing.assert_allclose(Generator(seed).randn((size,)), reference, rtol=0, atol=BOUND)


@pytest.mark.parametrize("seed", [0, 2**40 + 3])
def test_successive_draws_of_mixed_sizes_equal_torch(seed: int) -> None:
    """An odd number of values below 16 leaves one for the next such draw, even if larger draws come between."""
    ours, theirs = Generator(seed), torch_generator(seed)
    for size in (3, 16, 1, 5, 40, 7, 0, 2, 700, 1, 1, 33, 15, 15):
        reference = torch.randn(size, generator=theirs).numpy()
        np.testing.assert_allclose(ours.randn((size,)), reference, rtol=0, atol=BOUND)


@pytest.mark.parametrize("shape", [(1, 32, 16, 16), (3, 32, 8, 12), (2, 16, 3, 5), (1, 32, 32, 32)])
def test_latents_equal_diffusers(shape: tuple[int, ...]) -> None:
    reference = randn_tensor(shape, generator=torch_generator(11), dtype=torch.float32).numpy()
    np.testing.assert_allclose(randn_latents(shape, Generator(11)), reference, rtol=0, atol=BOUND)


def test_a_generator_for_each_picture_equals_diffusers() -> None:
    seeds = (5, 6, 7)
    reference = randn_tensor((3, 4, 5, 3), generator=[torch_generator(seed) for seed in seeds])
    ours = randn_latents((3, 4, 5, 3), [Generator(seed) for seed in seeds])
    np.testing.assert_allclose(ours, reference.numpy(), rtol=0, atol=BOUND)


def test_a_picture_has_the_same_noise_in_a_batch_and_alone() -> None:
    batch = randn_latents((2, 4, 4, 4), [Generator(1), Generator(2)])
    np.testing.assert_array_equal(batch[1:], randn_latents((1, 4, 4, 4), Generator(2)))


def test_too_few_generators_are_refused() -> None:
    with pytest.raises(UsageError, match="generators is 1, but the number of pictures is 2"):
        randn_latents((2, 4, 4, 4), [Generator(0)])


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_torch_refuses_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match="seed"):
        Generator(seed)
    with pytest.raises((RuntimeError, ValueError)):
        torch_generator(seed)
