"""Pictures in files that a user names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ditc.runtime.errors import UsageError
from ditc.runtime.limits import MAX_SIDE

# The formats that cameras, browsers and drawing programs write. Pillow knows many others, with more faults.
FORMATS = ("PNG", "JPEG", "WEBP")


def read_image(path: Path, option: str) -> Image.Image:
    """The picture in a file, decoded.

    Args:
        option: the option that names the file, for messages.

    Raises:
        UsageError: the file cannot be read, is of another format, is damaged or too large.
    """
    with _opened(path, option) as file:
        file.load()
        return file.copy()  # with the EXIF data, but not the file


def check_image(path: Path, option: str) -> None:
    """Check that a file begins as a picture of an allowed size does. It is not decoded. Raises as `read_image`."""
    with _opened(path, option):
        pass


@contextmanager
def _opened(path: Path, option: str) -> Iterator[Image.Image]:
    """The picture in a file before it is decoded. Errors of decoding it inside are turned into UsageError, too."""
    hint = f"name a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                if max(file.size) > MAX_SIDE:
                    raise UsageError(
                        f"{option} {path} has {file.width}x{file.height} pixels",
                        hint=f"use a picture with at most {MAX_SIDE} pixels on a side",
                    )
                yield file
    except UnidentifiedImageError as e:
        raise UsageError(f"{option} {path} is not a picture that ditc reads", hint=hint) from e
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as e:
        raise UsageError(f"{option} {path} has too many pixels: {e}", hint="use a smaller picture") from e
    except (OSError, SyntaxError, ValueError) as e:
        raise UsageError(f"{option} {path} cannot be read: {e}", hint=hint) from e
