"""Check output paths before long work starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ditc.runtime.errors import OutputError


def check_writable(path: Path, argument: str) -> None:
    """Refuse a path to which no file can be written. Missing parent folders are allowed, as they can be made.

    Args:
        argument: the option that gave the path, such as "-o" or "--html", for the hint.

    Raises:
        OutputError: the path is a directory or a device, a parent is a file, or there is no permission.
    """
    hint = f"choose another {argument}"
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises if a parent may not be searched)
        raise OutputError(f"cannot write {path}: it is a directory", hint=hint)
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113
        raise OutputError(f"cannot write {path}: it is a device or a pipe, not a file", hint=hint)
    existing = next(parent for parent in path.absolute().parents if os.path.exists(parent))  # noqa: PTH110
    if not existing.is_dir():
        raise OutputError(f"cannot write {path}: {existing} is a file", hint=hint)
    try:
        # Not os.access, which says that root may write to /proc, where nobody can.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as e:
        raise OutputError(f"cannot write {path}: {existing}: {e.strerror or e}", hint=hint) from e
