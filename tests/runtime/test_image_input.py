"""Pictures and masks that callers give become what diffusers' VaeImageProcessor makes of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ditc.runtime.errors import UsageError
from ditc.runtime.image_input import given_images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (37, 50, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
GREY = RNG.integers(0, 256, (37, 50), dtype=np.uint8)
IMAGES = VaeImageProcessor(vae_scale_factor=2)
MASKS = VaeImageProcessor(vae_scale_factor=2, do_normalize=False, do_binarize=True, do_convert_grayscale=True)


def picture(value: Any, height: int = 64, width: int = 32) -> np.ndarray:
    return given_images("image", value, channels=3).picture(0, height, width)


@pytest.mark.parametrize("size", [(64, 32), (16, 80), (37, 50)])
def test_pictures_are_resized_as_by_diffusers(size: tuple[int, int]) -> None:
    ours = given_images("image", PICTURE, channels=3).picture(0, *size)
    height, width = size[0] // 2 * 2, size[1] // 2 * 2
    if (height, width) == size:
        theirs = IMAGES.preprocess(PICTURE, height=height, width=width).numpy()
        np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (1, 3, *size) and ours.min() >= -1 and ours.max() <= 1


@pytest.mark.parametrize("size", [(64, 32), (16, 80)])
def test_arrays_and_tensors_take_the_nearest_pixel_as_in_diffusers(size: tuple[int, int]) -> None:
    floats = PIXELS.astype(np.float32) / 255
    theirs = IMAGES.preprocess(floats, height=size[0], width=size[1]).numpy()
    np.testing.assert_array_equal(picture(floats, *size), theirs)
    tensor = torch.from_numpy(floats).permute(2, 0, 1)
    np.testing.assert_array_equal(picture(tensor, *size), theirs)
    np.testing.assert_allclose(picture(PIXELS, *size), theirs, atol=1e-6)  # 8-bit integers are divided here


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_masks_are_binarized_as_by_diffusers(mode: str) -> None:
    given = Image.fromarray(GREY).convert(mode)
    ours = given_images("mask_image", given, channels=1).mask(0, 64, 32)
    theirs = MASKS.preprocess(given, height=64, width=32).numpy()
    np.testing.assert_array_equal(ours, theirs)
    assert set(np.unique(ours)) == {0, 1}


def test_a_mask_as_an_array_is_binarized() -> None:
    floats = GREY.astype(np.float32) / 255
    ours = given_images("mask_image", floats, channels=1).mask(0, 64, 32)
    theirs = MASKS.preprocess(floats[None], height=64, width=32).numpy()
    np.testing.assert_array_equal(ours, theirs)


def test_a_picture_is_turned_upright() -> None:
    """A camera's picture says in its EXIF data how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    stream = io.BytesIO()
    PICTURE.save(stream, "PNG", exif=exif)
    stream.seek(0)
    turned = given_images("image", Image.open(stream), channels=3)
    assert turned.size() == (50, 37)
    np.testing.assert_array_equal(turned.picture(0, 50, 37), picture(np.rot90(PIXELS, 3), 50, 37))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_put_on_white(mode: str) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    given = clear.convert(mode) if mode != "P" else clear.quantize(4)
    assert (picture(given, 8, 8) == 1).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("photo.jpg", r"image is 'photo.jpg', which is no picture"),
        (b"GIF89a", "which is no picture"),
        (3, "image is 3, which is no picture"),
        ([], "image is empty"),
        (np.zeros((4, 4, 2)), r"image has shape \(4, 4, 2\)"),
        (np.zeros((3, 4, 4)), r"image has shape \(3, 4, 4\)"),
        (np.zeros((0, 4, 3)), r"image has shape \(0, 4, 3\)"),
        (torch.zeros(4, 4, 3), r"image has shape \(4, 4, 3\)"),
        (np.full((4, 4, 3), 255.0), "image has values from 255 to 255"),
        (np.full((4, 4, 3), np.nan), "image: 48 values are NaN or Inf"),
        (Image.new("I;16", (4, 4)), "form I;16, with more than 8 bits"),
        (Image.new("L", (70_000, 1)), "image is 70000x1 pixels"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_hint(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        given_images("image", value, channels=3)
    assert caught.value.hint


def test_a_picture_that_breaks_off_is_refused() -> None:
    stream = io.BytesIO()
    PICTURE.save(stream, "PNG")
    broken = Image.open(io.BytesIO(stream.getvalue()[:600]))
    with pytest.raises(UsageError, match="cannot be read"):
        given_images("image", broken, channels=3)
