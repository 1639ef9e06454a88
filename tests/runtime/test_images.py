"""Pictures, compared with those of diffusers' image processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor

from ditc.runtime.images import is_uniform, preview, resize_and_crop, to_pil, to_uint8, to_unit_range

# Four float32 products of values up to 1.5, summed in another order than torch's. Measured: 3.6e-7.
RESIZE_BOUND = 1e-6
# Where torch has no fused multiply-add, it rounds a source coordinate twice and not once.
FUSED = torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def resize_bound(height: int, width: int) -> float:
    """An ulp of either coordinate moves a pixel by that share of the step to its neighbour, which is 3 at most."""
    moved = 0.0 if FUSED else 3 * float(np.spacing(np.float32(height)) + np.spacing(np.float32(width)))
    return RESIZE_BOUND + moved


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).uniform(-1.5, 1.5, shape).astype(np.float32)


def test_pictures_equal_diffusers_bit_for_bit() -> None:
    batch = images(3, 3, 40, 56)
    # These values lie halfway between two 8-bit values, and must be rounded to even.
    batch[0, 0, 0] = (np.arange(56) + 0.5) / 255 * 2 - 1
    processor = PixArtImageProcessor(vae_scale_factor=32)
    reference = processor.postprocess(torch.from_numpy(batch))
    for ours, theirs in zip(to_pil(to_uint8(batch)), reference, strict=True):
        assert ours.mode == theirs.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    floats = processor.postprocess(torch.from_numpy(batch), output_type="np")
    np.testing.assert_array_equal(to_unit_range(batch), floats)


@pytest.mark.parametrize(
    ("drawn", "asked"),
    [
        ((64, 64), (64, 64)),
        ((64, 64), (100, 100)),
        ((64, 96), (50, 90)),
        ((96, 64), (33, 71)),
        ((128, 32), (64, 64)),
        ((32, 128), (511, 300)),
        ((704, 1344), (720, 1280)),
        ((576, 960), (333, 777)),
        ((960, 576), (1, 1)),
    ],
)
def test_resizing_back_equals_diffusers(drawn: tuple[int, int], asked: tuple[int, int]) -> None:
    batch = images(1, 3, *drawn)
    height, width = asked
    reference = PixArtImageProcessor.resize_and_crop_tensor(torch.from_numpy(batch), width, height)
    ours = resize_and_crop(batch, height, width)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, reference.numpy(), rtol=0, atol=resize_bound(*drawn))


def test_a_size_that_diffusers_makes_one_pixel_wide_is_resized_correctly() -> None:
    """diffusers 0.42.1: int(1344 * max(256 / 704, 492 / 1344)) is 491, and the crop starts at -1."""
    batch = images(1, 3, 704, 1344)
    broken = PixArtImageProcessor.resize_and_crop_tensor(torch.from_numpy(batch), 492, 256)
    assert broken.shape == (1, 3, 256, 1)
    scaled = torch.nn.functional.interpolate(torch.from_numpy(batch), size=(257, 492), mode="bilinear")
    whole = resize_and_crop(batch, 256, 492)
    np.testing.assert_allclose(whole, scaled[:, :, :256], rtol=0, atol=resize_bound(704, 1344))


def test_one_different_pixel_makes_a_picture_not_uniform() -> None:
    picture = np.full((1, 8, 8, 3), (10, 20, 30), np.uint8)
    assert is_uniform(picture)
    picture[0, 3, 4, 2] += 1
    assert not is_uniform(picture)


def test_a_preview_is_the_linear_map_of_every_cell() -> None:
    matrix = np.array([[1.0, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, -1, 0]])
    latents = images(4, 5, 7)
    picture = np.asarray(preview(latents[None], matrix, np.array([0.0, 0.25, 0.0])))
    assert picture.shape == (5, 7, 3)
    expected = matrix @ latents[:, 2, 6] + [0.0, 0.25, 0.0]
    np.testing.assert_array_equal(picture[2, 6], to_uint8(expected.reshape(1, 3, 1, 1))[0, 0, 0])
    np.testing.assert_array_equal(preview(latents, matrix, np.array([0.0, 0.25, 0.0])), picture)
