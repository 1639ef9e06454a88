"""Check output paths before long work starts."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from ditc.runtime.errors import OutputError

# Space for a small result, such as a report. A full disk still lets empty files be made.
SMALL_BYTES = 64 * 1024
# At most so much is reserved for the check. Where reserving means writing, as on tmpfs, more would take long.
RESERVED_BYTES = 64 * 1024**2


def check_writable(path: Path, argument: str, *, needed_bytes: int = SMALL_BYTES) -> None:
    """Refuse a path to which no file can be written. Missing parent folders are allowed, as they can be made.

    Args:
        argument: the option that gave the path, such as "-o" or "--html", for the hint.
        needed_bytes: how much space the results in the path's folder will take.

    Raises:
        OutputError: the path is a directory or a device, a parent is a file, a name is too long or not possible on the
            file system, there is no permission, or not enough space.
    """
    existing, hint = check_name(path, argument), _hint(argument)
    try:
        # Not os.access, which says that root may write to /proc, where nobody can.
        with tempfile.TemporaryFile(dir=existing) as file:
            _reserve(file.fileno(), min(needed_bytes, RESERVED_BYTES))
        if shutil.disk_usage(existing).free < needed_bytes:
            raise OSError(
                errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {needed_bytes / 1e6:.1f} MB are needed"
            )
    except OSError as e:
        raise OutputError(f"cannot write {path}: {existing}: {e.strerror or e}", hint=hint) from e


def check_name(path: Path, argument: str) -> Path:
    """The part of `check_writable` that writes nothing, for further files of one folder.

    Returns:
        The lowest folder of the path that exists.

    Raises:
        OutputError: as `check_writable`, but for permission and space.
    """
    hint = _hint(argument)
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises if a parent may not be searched)
        raise OutputError(f"cannot write {path}: it is a directory", hint=hint)
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113
        raise OutputError(f"cannot write {path}: it is a device or a pipe, not a file", hint=hint)
    whole = path.absolute()
    existing = next(parent for parent in whole.parents if os.path.exists(parent))  # noqa: PTH110
    if not existing.is_dir():
        raise OutputError(f"cannot write {path}: {existing} is a file", hint=hint)
    try:
        _check_names(whole, existing)
    except (OSError, ValueError) as e:  # ValueError: a NUL, or a name that has no encoding
        raise OutputError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}", hint=hint) from e
    return existing


def _hint(argument: str) -> str:
    return f"choose another {argument}"


def _check_names(path: Path, existing: Path) -> None:
    """Look every name below the existing folder up in it: only its file system knows which names are possible.

    Raises:
        OSError: a name, or the whole path, is too long, or has characters that are not possible there.
        ValueError: the name cannot be encoded.
    """
    for place in (path, *(existing / part for part in path.relative_to(existing).parts)):
        try:
            place.lstat()
        except FileNotFoundError:
            continue


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Allocate the space in an open file, which fails on a full disk and beyond a quota. Not every system can."""
    if hasattr(os, "posix_fallocate") and size_bytes:  # a size of 0 is an error
        os.posix_fallocate(descriptor, 0, size_bytes)
