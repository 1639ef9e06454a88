"""Pictures that a caller gives: to arrays for the VAE's encoder, as diffusers' VaeImageProcessor (0.42.1) makes them.

Pillow's pictures are resized with the Lanczos filter. Arrays and tensors hold values from 0 to 1 and are resized by
taking the nearest pixel. Unlike in diffusers, a picture is first turned as its EXIF orientation says, a picture with
transparency is put on white, and arrays of 8-bit integers are divided by 255.
"""

# B pictures, H/W size in pixels, h/w size in latent cells

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ditc.runtime.arrays import given_array
from ditc.runtime.errors import UsageError
from ditc.runtime.limits import MAX_SIDE

Floats = NDArray[np.float32]
# Modes with more than 8 bits per channel, which Pillow would cut off instead of scaling.
_DEEP = ("I", "F")


@dataclass(frozen=True, eq=False)
class GivenImages:
    """The pictures of a request, checked but not yet resized.

    Attributes:
        pictures: Pillow's pictures, turned upright, or arrays (H,W,channels) with values from 0 to 1.
    """

    pictures: tuple[Image.Image | Floats, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def size(self) -> tuple[int, int]:
        """(height, width) of the first picture."""
        first = self.pictures[0]
        return (first.height, first.width) if isinstance(first, Image.Image) else first.shape[:2]

    def resized(self, height: int, width: int, *, masks: bool = False) -> GivenImages:
        """The same at the drawn size, so that large pictures need not be kept while a request waits."""
        size = (width, height)
        return GivenImages(
            tuple(
                (one if masks else on_white(one)).resize(size, Image.Resampling.LANCZOS)
                if isinstance(one, Image.Image)
                else _nearest(one, height, width)
                for one in self.pictures
            )
        )

    def picture(self, index: int, height: int, width: int) -> Floats:
        """One picture as the encoder takes it: (1,3,height,width) in [-1,1]."""
        given = self.pictures[index]
        if isinstance(given, Image.Image):
            rgb = on_white(given).resize((width, height), Image.Resampling.LANCZOS)
            given = np.asarray(rgb, np.float32) / np.float32(255)
        pixels = _nearest(given, height, width)
        return np.ascontiguousarray((2 * pixels - 1).transpose(2, 0, 1)[None], np.float32)

    def mask(self, index: int, height: int, width: int) -> Floats:
        """One mask (1,1,height,width): 1 where it is at least half white, which is what is drawn anew, else 0."""
        given = self.pictures[index]
        if isinstance(given, Image.Image):
            grey = given.resize((width, height), Image.Resampling.LANCZOS).convert("L")
            given = np.asarray(grey, np.float32)[..., None] / np.float32(255)
        pixels = _nearest(given, height, width)
        return np.ascontiguousarray((pixels >= 0.5).transpose(2, 0, 1)[None], np.float32)


def given_images(name: str, value: Any, *, channels: int) -> GivenImages:
    """Check a picture or a sequence of pictures.

    Args:
        name: what the caller calls it, for messages.
        value: a picture of Pillow; an array (H,W), (H,W,channels) or (B,H,W,channels), of 8-bit integers or of numbers
            from 0 to 1; a tensor of torch (channels,H,W) or (B,channels,H,W) with numbers from 0 to 1; or a sequence
            of these.
        channels: 3 for pictures, 1 for masks.

    Raises:
        UsageError: this is none of them. The message names the argument and what is wrong with it.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        found = tuple(picture for one in value for picture in _pictures(name, one, channels))
    else:
        found = _pictures(name, value, channels)
    if not found:
        raise UsageError(f"{name} is empty", hint="pass one picture, or one per prompt")
    return GivenImages(found)


def on_white(picture: Image.Image) -> Image.Image:
    """The picture as RGB, on white where it is transparent."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _pictures(name: str, value: Any, channels: int) -> tuple[Image.Image | Floats, ...]:
    if isinstance(value, Image.Image):
        return (_upright(name, value),)
    if isinstance(value, str | bytes) or not hasattr(value, "ndim"):
        raise UsageError(
            f"{name} is {value!r:.80}, which is no picture",
            hint="pass a picture of Pillow (PIL.Image.open(path)), an array or a tensor",
        )
    is_torch = hasattr(value, "detach")
    whole = getattr(value, "dtype", None) == np.uint8
    array = given_array(name, value, hint="pass numbers from 0 to 1")
    if array.ndim == 2:
        array = array[..., None]
    elif is_torch and array.ndim in (3, 4):
        array = np.moveaxis(array, -3, -1)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[3] != channels or 0 in array.shape or max(array.shape[1:3]) > MAX_SIDE:
        order = (
            f"({channels},H,W) or (B,{channels},H,W)"
            if is_torch
            else f"(H,W,{channels}) or (B,H,W,{channels})"
        )
        raise UsageError(
            f"{name} has shape {tuple(value.shape)}",
            hint=f"pass {order}, with sides of 1 to {MAX_SIDE} pixels",
        )
    if whole:
        array = array / np.float32(255)
    if array.min() < 0 or array.max() > 1:
        raise UsageError(
            f"{name} has values from {array.min():g} to {array.max():g}",
            hint="pass numbers from 0 to 1, or 8-bit integers",
        )
    return tuple(array)


def _upright(name: str, picture: Image.Image) -> Image.Image:
    if max(picture.size) > MAX_SIDE or min(picture.size) < 1:
        raise UsageError(
            f"{name} is {picture.width}x{picture.height} pixels", hint=f"pass sides of 1 to {MAX_SIDE} pixels"
        )
    if picture.mode.startswith(_DEEP):
        raise UsageError(
            f"{name} has pixels of the form {picture.mode}, with more than 8 bits",
            hint='convert it to 8 bits first, with the range of values that you want: then picture.convert("RGB")',
        )
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError) as e:  # Pillow reads the pixels only now
        raise UsageError(f"{name} cannot be read: {e}", hint="pass a complete picture") from e


def _nearest(pixels: Floats, height: int, width: int) -> Floats:
    """The pixels that torch's interpolate(mode="nearest") takes: those at floor(index * old / new), in float32."""
    for axis, new in ((0, height), (1, width)):
        old = pixels.shape[axis]
        if old != new:
            scale = np.float32(old) / np.float32(new)
            source = np.floor(np.arange(new, dtype=np.float32) * scale).astype(np.int64)
            pixels = pixels.take(np.minimum(source, old - 1), axis)
    return pixels
