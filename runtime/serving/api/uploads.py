"""Pictures that clients send: bytes, or a data URL, -> a picture whose size is known and allowed -> RGB and alpha mask.

Nothing is decoded before there is room for all pictures of a request: a few kilobytes can be 4 million pixels.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ditc.runtime.image_input import on_white
from ditc.runtime.limits import MAX_SIDE
from ditc.runtime.serving.api.upload_formats import Animated, Malformed, StillPicture, read_picture
from ditc.runtime.serving.refusals import Invalid

# 4096x4096. Decoded with alpha it takes 64 MB, and about a second.
MOST_PIXELS = 2**24
# What a decoded picture takes while it is made ready for a request: Pillow has 4 bytes for each pixel of RGB, of which
# there is one copy, and 1 for alpha.
PIXEL_BYTES = 9
_FORMATS = "PNG, JPEG or WebP"
_DATA_URL = re.compile(r"data:image/(?:png|jpeg|webp);base64,", re.IGNORECASE)

# How a picture of each Exif orientation is put upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Upload:
    """A picture from a client.

    Attributes:
        image: RGB, upright, on white where it is transparent. Colours that nobody sees there count for nothing.
        alpha: L, 0 where the picture is transparent; None if it is opaque everywhere.
    """

    image: Image.Image
    alpha: Image.Image | None


@dataclass(frozen=True, slots=True)
class Sent:
    """A picture from a client that is not decoded.

    Attributes:
        param: the argument that it came in, for errors.
    """

    still: StillPicture
    param: str

    @property
    def decoded_bytes(self) -> int:
        """The memory that it needs when it is decoded."""
        return self.still.width * self.still.height * PIXEL_BYTES

    def decoded(self) -> Upload:
        """Decode it. It may take a second, so call it on a worker thread.

        Raises:
            Invalid: it is damaged.
        """
        try:
            decoded = _decoded(self.still)
        except Exception:  # PIL raises nearly everything, with texts that are not for clients
            raise _damaged(self.param) from None
        upright = _UPRIGHT.get(self.still.orientation)
        return _split(decoded if upright is None else decoded.transpose(upright))


def read_upload(data: bytes | str, *, param: str = "image", most_pixels: int = MOST_PIXELS) -> Sent:
    """Read a picture of a client as far as its size. Call it on a worker thread: it goes through the whole file.

    Args:
        data: the file, or a data URL (RFC 2397) with base64. The media type of the latter only has to be that of a
            picture: what the file is, its content says.
        param: the argument that it came in, for errors.
        most_pixels: a larger one is refused.

    Raises:
        Invalid: it is not one still picture of a known format and an allowed size.
    """
    if isinstance(data, str):
        data = _of_data_url(data, param)
    try:
        still = read_picture(data)
    except Animated:
        raise Invalid("the picture is animated", hint="send a single picture", param=param) from None
    except Malformed:
        raise _damaged(param) from None
    if still is None:
        raise Invalid(
            "the file is not a picture that this server reads", hint=f"send {_FORMATS}", param=param
        )
    if still.width < 1 or still.height < 1:
        raise _damaged(param)
    if still.width * still.height > most_pixels or max(still.width, still.height) > MAX_SIDE:
        raise Invalid(
            f"the picture has {still.width}x{still.height} pixels, and the server takes at most {most_pixels} pixels, "
            f"{MAX_SIDE} on a side",
            hint="send a smaller one",
            param=param,
            code="image_too_large",
        )
    return Sent(still, param)


def _of_data_url(url: str, param: str) -> bytes:
    match = _DATA_URL.match(url)
    if match is None:
        raise Invalid(
            f"{param} is {url[:40]!r}, which is no data URL of a picture",
            hint='send the file itself, as "data:image/png;base64,..."; addresses are not fetched',
            param=param,
        )
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except ValueError:
        raise Invalid(
            f"the base64 of {param} is damaged",
            hint="send the standard alphabet without line ends, with padding",
            param=param,
        ) from None


def _damaged(param: str) -> Invalid:
    return Invalid(
        "the picture is damaged or not complete", hint=f"send a whole {_FORMATS} file", param=param
    )


def _decoded(still: StillPicture) -> Image.Image:
    """The pixels as 8-bit RGB or RGBA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(still.data), formats=(still.format,)) as file:
            if file.size != (still.width, still.height) or getattr(file, "n_frames", 1) != 1:
                raise Malformed("the decoder sees another picture")
            file.load()
            image: Image.Image = file
            if image.mode.startswith("I"):  # 16-bit grey, of which PIL would keep the lower 8 bits
                image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            return image.convert("RGBA" if has_alpha else "RGB")


def _split(image: Image.Image) -> Upload:
    if image.mode == "RGB":
        return Upload(image, None)
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return Upload(image.convert("RGB"), None)
    return Upload(on_white(image), alpha)
