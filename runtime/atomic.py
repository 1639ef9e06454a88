"""Writes files and folders whole or not at all: under a temporary name, which is then renamed to the final one.

    write_atomic(path, content)     text or bytes
    atomic_path(path)               gives a temporary path, for libraries that write the file by themselves
    atomic_files(*paths)            files that refer to each other, such as a graph and its weights
    atomic_folder(path)             a whole folder
    scratch_file(path, content)     a temporary file beside another one, which is removed after use

Temporary names are random, and the files are created exclusively: a link that somebody planted under such a name is not
followed, and two writers never share a name. A killed process leaves its temporary files behind; `remove_leftovers`
recognises them by the form of their names. The mode of the result follows the user's umask, not the library that wrote
the file.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ditc.runtime.errors import OutputError

SUFFIX = ".partial"
HINT = "choose another place"
_TRIES = 100
# The temporary names, with a random token. A user's own file that only ends in the suffix is not one of them.
_TEMPORARY = re.compile(rf"\..+\.[0-9a-f]{{16}}{re.escape(SUFFIX)}")
_ADVICE = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space within your quota",
    errno.EACCES: "get the permission to write there",
    errno.EPERM: "get the permission to write there",
    errno.EROFS: "make that file system writable",
}


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True, hint: str = HINT) -> Path:
    """Write a whole file; see `atomic_path`. Text is encoded as UTF-8, and its line ends are kept."""
    with atomic_path(path, durable=durable, hint=hint) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def atomic_path(path: Path, *, durable: bool = True, hint: str = HINT) -> Iterator[Path]:
    """An empty file beside `path`, to be written inside the block. It is renamed to `path` when the block succeeds.

    Args:
        path: its folder is made if it is missing. A link is replaced, not followed.
        durable: wait until the file is on the disk. Caches, which can be made again at any time, do not need it.
        hint: what the user can do if the file cannot be written.

    Raises:
        OutputError: the file cannot be written. An older file is unchanged, as after every other error.
    """
    with _as_output_error(path, hint):
        _check_replaceable(path)
        partial = _new(path, _create)
        mode = _mode(partial)
        try:
            yield partial
            _finish(partial, mode, durable)
            os.replace(partial, path)
        finally:
            _discard(partial)
        _sync_folder(path.parent, durable)


@contextmanager
def atomic_files(*paths: Path, hint: str = HINT) -> Iterator[Path]:
    """A temporary folder for files that belong in one folder, are written together and may refer to each other.

    The files that the block writes under the names of the paths are moved to the paths, in the given order, so the file
    that readers open first should be the last path. Everything else in the temporary folder is removed.

    Raises:
        OutputError: a file cannot be written.
    """
    with _as_output_error(paths[-1], hint):
        for path in paths:
            _check_replaceable(path)
        folder = _new(paths[-1], _create_folder)
        try:
            yield folder
            written = [path for path in paths if (folder / path.name).is_file()]
            for path in written:
                _finish(folder / path.name, _mode(folder) & 0o666, True)
            for path in written:
                os.replace(folder / path.name, path)
        finally:
            _discard(folder)
        _sync_folder(paths[-1].parent, True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False, hint: str = HINT) -> Iterator[Path]:
    """A temporary folder beside `path`, to be filled inside the block. It is renamed to `path` when the block succeeds.

    Args:
        replace: let the new folder replace an older one. This takes two renames. A process that is killed between them
            leaves no folder at `path`; the older one is then beside it, under a temporary name.

    Raises:
        OutputError: the folder cannot be written, or it exists already.
    """
    with _as_output_error(path, hint):
        if os.path.lexists(path) and not (replace and path.is_dir()):
            raise FileExistsError(errno.EEXIST, "it exists already")
        partial = _new(path, _create_folder)
        try:
            yield partial
            _sync_tree(partial)
            if replace and path.is_dir():
                _swap(partial, path)
            else:
                partial.rename(path)
        finally:
            _discard(partial)
        _sync_folder(path.parent, True)


@contextmanager
def scratch_file(path: Path, content: bytes, *, hint: str = HINT) -> Iterator[Path]:
    """A file with this content beside `path`, under a temporary name. It is removed after the block.

    Raises:
        OutputError: the file cannot be written.
    """
    with _as_output_error(path, hint):
        scratch = _new(path, _create)
    try:
        with _as_output_error(path, hint):
            scratch.write_bytes(content)
        yield scratch
    finally:
        _discard(scratch)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left directly in a folder."""
    for path in list(folder.glob(f".*{SUFFIX}")):
        if _TEMPORARY.fullmatch(path.name):
            _discard(path)


def output_error(path: Path, error: OSError, hint: str = HINT) -> OutputError:
    """An OutputError that says which path could not be written, why, and what to do."""
    reason = error.strerror or str(error)
    other = "" if error.filename is None else str(error.filename)
    if other and other != str(path) and SUFFIX not in other:
        reason = f"{reason} ({other})"
    advice = _ADVICE.get(error.errno or 0)
    return OutputError(f"cannot write {path}: {reason}", hint=f"{advice}, or {hint}" if advice else hint)


@contextmanager
def _as_output_error(path: Path, hint: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise output_error(path, e, hint) from e


def _check_replaceable(path: Path) -> None:
    """Refuse a path that the final rename cannot or should not replace: a directory, a device, a pipe."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")


def _new(path: Path, create: Callable[[Path], None]) -> Path:
    """Create a temporary file or folder beside the path, and its parent folders if they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(_TRIES):
        partial = path.parent / f".{path.name[:40]}.{_token()}{SUFFIX}"  # as _TEMPORARY
        with suppress(FileExistsError):
            create(partial)
            return partial
    raise FileExistsError(errno.EEXIST, "every temporary name is taken")


def _token() -> str:
    return os.urandom(8).hex()


def _create(path: Path) -> None:
    """Make an empty file. O_EXCL makes this fail if the name exists, even as a dangling link (POSIX open)."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))


def _create_folder(path: Path) -> None:
    path.mkdir()


def _mode(path: Path) -> int:
    """The mode bits of a path. Those of a new file show the umask, which cannot be read without changing it."""
    return stat.S_IMODE(path.stat().st_mode)


def _finish(path: Path, mode: int, durable: bool) -> None:
    """Set the file's mode (safetensors 0.6 and later make private files) and, if durable, flush it to the disk."""
    if _mode(path) != mode:
        path.chmod(mode)
    if durable:
        _sync(path)


def _sync(path: Path) -> None:
    # Windows flushes only files that are open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path, durable: bool) -> None:
    """Flush a folder's names to the disk. Errors are ignored: not every platform and file system supports this."""
    if durable:
        with suppress(OSError):
            _sync(folder)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path, True)
        elif path.is_file() and not path.is_symlink():
            _sync(path)
    _sync_folder(folder, True)


def _swap(new: Path, path: Path) -> None:
    old = _new(path, _create_folder)
    old.rmdir()  # only the name is needed, and Windows cannot rename onto a folder
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    _discard(old)


def _discard(path: Path) -> None:
    """Remove a file or folder if it exists. A failure to do so must not hide the error that led here."""
    with suppress(OSError):  # is_dir may fail too, if a parent is a file
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
