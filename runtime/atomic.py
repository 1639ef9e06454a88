"""Files and folders that appear whole or not at all: made under a temporary name, then moved to their own.

    write_atomic(path, content)     text or bytes
    atomic_path(path)               the temporary path, for a library that writes to a path by itself
    atomic_files(*paths)            files that name each other, such as a graph and its weights
    atomic_folder(path)             a whole folder
    scratch_file(path, content)     a file beside another one, which is removed again

Temporary names are random and are created exclusively: no link that was planted under such a name is followed, and two
writers never share one. A killed process leaves its temporary files behind; their suffix tells `remove_leftovers`
which they are. The mode of the result is what the user's umask gives, whatever the library that wrote it chose.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ditc.runtime.errors import OutputError

SUFFIX = ".partial"
HINT = "choose another place"
_TRIES = 100
_ADVICE = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space within your quota",
    errno.EACCES: "get the permission to write there",
    errno.EPERM: "get the permission to write there",
    errno.EROFS: "make that file system writable",
}


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True, hint: str = HINT) -> Path:
    """Write a file as a whole; see `atomic_path`. Text is encoded as UTF-8 and its line ends are kept."""
    with atomic_path(path, durable=durable, hint=hint) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def atomic_path(path: Path, *, durable: bool = True, hint: str = HINT) -> Iterator[Path]:
    """An empty file beside `path`, to be written inside the block; it becomes `path` when the block succeeds.

    Args:
        path: its folder is made if it is missing; a link is replaced, not followed.
        durable: also wait until the disk has the file. Leave it out for what can be made again at any time.
        hint: what the user can do if the place cannot be written to.

    Raises:
        OutputError: the file cannot be written. As after every other error, an older file is as it was.
    """
    with _told(path, hint):
        _check_place(path)
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
    """A temporary folder for files of one folder that are written together and may name each other.

    Those that the block has written under the paths' names are moved to the paths, in the order given: name last
    what readers look for first. Everything else in the temporary folder is removed.

    Raises:
        OutputError: a file cannot be written.
    """
    with _told(paths[-1], hint):
        for path in paths:
            _check_place(path)
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
    """A temporary folder beside `path`, to be filled inside the block; it becomes `path` when the block succeeds.

    Args:
        replace: let the new folder take the place of an older one. Only a process that is killed between the two
            moves leaves no folder of that name; the older one is then beside it, under a temporary name.

    Raises:
        OutputError: the folder cannot be written, or it exists already.
    """
    with _told(path, hint):
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
    """A file with this content beside `path`, under a temporary name, which is removed after the block.

    Raises:
        OutputError: it cannot be written.
    """
    with _told(path, hint):
        scratch = _new(path, _create)
    try:
        with _told(path, hint):
            scratch.write_bytes(content)
        yield scratch
    finally:
        _discard(scratch)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left anywhere below a folder."""
    for path in list(folder.rglob(f"*{SUFFIX}")):
        _discard(path)


def output_error(path: Path, error: OSError, hint: str = HINT) -> OutputError:
    """The error for people: which path, why, and what to do."""
    reason = error.strerror or str(error)
    other = "" if error.filename is None else str(error.filename)
    if other and other != str(path) and SUFFIX not in other:
        reason = f"{reason} ({other})"
    advice = _ADVICE.get(error.errno or 0)
    return OutputError(f"cannot write {path}: {reason}", hint=f"{advice}, or {hint}" if advice else hint)


@contextmanager
def _told(path: Path, hint: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise output_error(path, e, hint) from e


def _check_place(path: Path) -> None:
    """Refuse what the final move cannot replace, or should not: a directory, a device, a pipe."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")


def _new(path: Path, create: Callable[[Path], None]) -> Path:
    """Create a temporary file or folder beside the path, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(_TRIES):
        partial = path.parent / f".{path.name[:40]}.{_token()}{SUFFIX}"
        with suppress(FileExistsError):
            create(partial)
            return partial
    raise FileExistsError(errno.EEXIST, "every temporary name is taken")


def _token() -> str:
    return os.urandom(8).hex()


def _create(path: Path) -> None:
    """Make an empty file, and fail if there is anything of that name; a dangling link counts (O_EXCL, POSIX open)."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))


def _create_folder(path: Path) -> None:
    path.mkdir()


def _mode(path: Path) -> int:
    """Of a file or folder that was just created: what the umask gives, without touching the process's umask."""
    return stat.S_IMODE(path.stat().st_mode)


def _finish(path: Path, mode: int, durable: bool) -> None:
    """Give the file its mode (safetensors 0.6 and later make private files), and have the disk hold its content."""
    if _mode(path) != mode:
        path.chmod(mode)
    if durable:
        _sync(path)


def _sync(path: Path) -> None:
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path, durable: bool) -> None:
    """Have the disk hold the names in a folder. Not every platform and file system can; the move itself is done."""
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
    old.rmdir()  # only its name is needed: Windows moves nothing onto a folder
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    _discard(old)


def _discard(path: Path) -> None:
    """Remove a file or folder if it is there. What cannot be removed must not hide the error that led here."""
    with suppress(OSError):  # where a parent is a file, asking already fails
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
