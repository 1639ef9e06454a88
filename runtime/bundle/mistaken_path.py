"""A hint for a path that is not a bundle: what the user probably wanted to name."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CHECKPOINT_INDEX = "model_index.json"


def meant(path: Path, manifest: str) -> str:
    """A hint for a path without a manifest, whose file name is `manifest`; "" if nothing can be said.

    A checkpoint is told apart, because a build with the hint for a damaged bundle would write into it. A bundle in the
    folder, or around it, is named.
    """
    if path.is_file():
        return "name the bundle's directory"
    if os.path.isfile(path / CHECKPOINT_INDEX):  # noqa: PTH113 (Path.is_file raises if the folder may not be searched)
        return f"it is a checkpoint; build a bundle from it: ditc build {path} -o BUNDLE"
    with suppress(OSError):
        for near in (*sorted(path.iterdir()), *path.absolute().parents[:2]):
            if os.path.isfile(near / manifest):  # noqa: PTH113
                return f"{near} is a bundle"
    return ""
