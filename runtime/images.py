"""Decoder outputs to pictures (range, size, 8 bits), and rough previews of latents."""

# B pictures, H height, W width, C latent channels

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def to_unit_range(images: Floats) -> Floats:
    """(B,3,H,W) in [-1,1] to (B,H,W,3) in [0,1], like output_type="np" of diffusers (VaeImageProcessor)."""
    unit: Floats = np.clip(images * np.float32(0.5) + np.float32(0.5), 0, 1)
    return unit.transpose(0, 2, 3, 1)


def to_uint8(images: Floats) -> Bytes:
    """(B,3,H,W) in [-1,1] to (B,H,W,3), bit for bit like VaeImageProcessor.numpy_to_pil of diffusers."""
    return (to_unit_range(images) * np.float32(255)).round().astype(np.uint8)


def to_pil(pictures: Bytes) -> list[Image.Image]:
    """The B pictures of (B,H,W,3) as PIL images."""
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pictures]


def is_uniform(pictures: Bytes) -> bool:
    """Whether all pixels of (...,H,W,3) have the same colour, which only a broken network draws."""
    pixels = pictures.reshape(-1, pictures.shape[-1])
    return bool((pixels == pixels[0]).all())


def resize_and_crop(images: Floats, height: int, width: int) -> Floats:
    """Scale (B,3,h,w) to cover height x width, then crop it to that size around the centre.

    This is resize_and_crop_tensor of diffusers' image processors (bilinear, no antialiasing), with one difference.
    diffusers 0.42.1 rounds the scaled size down. If floating-point error puts it one pixel below the requested size,
    diffusers returns a picture that is one pixel wide or high (704x1344 to 256x492). Here the scaled size is never
    smaller than the requested size.
    """
    old_height, old_width = images.shape[2:]
    ratio = max(height / old_height, width / old_width)
    scaled_height = max(int(old_height * ratio), height)
    scaled_width = max(int(old_width * ratio), width)
    # Only the rows and columns inside the crop are computed.
    rows = slice((scaled_height - height) // 2, (scaled_height - height) // 2 + height)
    columns = slice((scaled_width - width) // 2, (scaled_width - width) // 2 + width)
    return _interpolate(_interpolate(images, 2, scaled_height, rows), 3, scaled_width, columns)


def _interpolate(images: Floats, axis: int, size: int, kept: slice) -> Floats:
    """Linear interpolation along one axis to `size` samples, of which only `kept` are computed.

    The arithmetic is that of torch's interpolate(mode="bilinear", align_corners=False): source coordinates are rounded
    to float32 once, after a fused multiply-add (aten/src/ATen/native/UpSample.h, area_pixel_compute_source_index). At
    coordinate 500, this rounding moves a pixel by up to 3e-5. On a CPU without fused multiply-add, torch rounds twice.
    """
    length = images.shape[axis]
    if length == size:
        return images.take(np.arange(kept.start, kept.stop), axis)
    scale = np.float32(length) / np.float32(size)
    exact = np.float64(scale) * (np.arange(kept.start, kept.stop) + 0.5) - 0.5
    source = np.maximum(exact.astype(np.float32), 0)
    low = np.minimum(source.astype(np.int64), length - 1)
    high = np.minimum(low + 1, length - 1)
    shape = [1] * images.ndim
    shape[axis] = -1
    weight = np.clip(source - low, 0, 1).astype(np.float32).reshape(shape)
    blended: Floats = images.take(low, axis) * (1 - weight) + images.take(high, axis) * weight
    return blended


def preview(latents: NDArray[Any], matrix: NDArray[Any], bias: NDArray[Any]) -> Image.Image:
    """A rough picture of latents (C,h,w) or (1,C,h,w), with one pixel per cell.

    Args:
        matrix, bias: (3,C) and (3,), fitted at build: rgb in [-1,1] = matrix @ cell + bias.
    """
    cells = latents.reshape(-1, *latents.shape[-2:]).astype(np.float32)
    rgb = np.tensordot(matrix, cells, axes=1) + np.reshape(bias, (3, 1, 1))
    return to_pil(to_uint8(rgb[None].astype(np.float32)))[0]
