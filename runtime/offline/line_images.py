"""The pictures that a line names: files in the folder of the input file, or below it.

Whoever wrote the lines need not be who draws them, so no line reads a file from elsewhere: a path is relative to the
input file's folder, has no `..`, and does not leave the folder through a symbolic link either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from ditc.runtime.errors import UsageError
from ditc.runtime.image_files import check_image, read_image

# The fields of a line that name a picture. They are those of Request, which holds the pictures themselves.
IMAGES = ("image", "mask_image", "control_image")
MAX_PATH_LENGTH = 4096


def check_paths(asked: Mapping[str, Any]) -> None:
    """Check the form of the paths in a line's fields. No file is touched.

    Raises:
        UsageError: a value is not a path, or the path leads out of the folder.
    """
    for name in IMAGES:
        value = asked.get(name)
        if value is None:
            continue
        if not isinstance(value, str) or not 0 < len(value) <= MAX_PATH_LENGTH or "\0" in value:
            raise UsageError(
                f"{name} is {value!r:.80}, not the path of a picture",
                hint=f"pass one path of 1 to {MAX_PATH_LENGTH} characters",
            )
        if value.startswith("data:"):
            raise UsageError(
                f"{name} is {value!r:.40}, not a path",
                hint="save the picture in a file beside the input, and name that",
            )
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or PureWindowsPath(value).drive:
            raise UsageError(
                f"{name} is {value!r:.80}, which leads out of the input file's folder",
                hint="pass a path relative to that folder, and put the picture there",
            )


def without_pictures(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with a picture of one pixel for each path, to check all else that a request must fulfil."""
    return {name: Image.new("RGB", (1, 1)) if name in IMAGES else value for name, value in asked.items()}


def check_files(asked: Mapping[str, Any], folder: Path) -> None:
    """Check the files that a line names, by their beginnings: no picture is decoded.

    Raises:
        UsageError: a file is missing, outside of the folder, no picture, or too large.
    """
    for name in IMAGES:
        if name in asked:
            check_image(_inside(folder, name, asked[name]), name)


def with_pictures(asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields with the pictures that the paths name.

    Raises:
        UsageError: as `check_files`, or a picture is damaged.
    """
    return {
        name: read_image(_inside(folder, name, value), name) if name in IMAGES else value
        for name, value in asked.items()
    }


def _inside(folder: Path, name: str, value: str) -> Path:
    """The file, with symbolic links resolved. Raises UsageError if it is not in the folder or below it."""
    try:
        path = (folder / value).resolve()
        if path.is_relative_to(folder.resolve()):
            return path
    except (OSError, RuntimeError) as e:  # RuntimeError: links that lead to each other
        raise UsageError(f"{name} {value!r:.80} cannot be read: {e}", hint="name a picture") from e
    raise UsageError(
        f"{name} is {value!r:.80}, a link that leads out of the input file's folder",
        hint="put the picture itself there",
    )
