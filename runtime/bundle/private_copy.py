"""Copies of a bundle's files that nobody else can write to: what was hashed is then what a library opens and maps.

A killed process leaves its folder behind. The kernel has then released its lock on it, so the next one removes it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ditc.runtime.atomic import output_error
from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import FileRef
from ditc.runtime.errors import BundleError, OutputError, UsageError

PREFIX = "ditc-copy-"
_in_use: set[Path] = set()  # the folders of this process
HINT = "let the environment variable TMPDIR name a folder on another disk"


def check_possible() -> None:
    """Raise UsageError where an open file cannot be removed, because copies of gigabytes would stay behind."""
    if os.name != "posix":
        raise UsageError(
            "private copies are made only on POSIX systems: Windows cannot remove a file that is open",
            hint="copy the bundle to a folder that only you may write to, and load it from there",
        )


@contextmanager
def private_copy(bundle: Path, refs: Sequence[FileRef]) -> Iterator[Path]:
    """Copy files into a new folder that only this user may enter, and compare the copies with the manifest.

    The folder is laid out as the bundle, and removed after the block. What is open or mapped then stays readable.

    Raises:
        BundleError: a copy differs from the manifest.
        OutputError: the folder for temporary files cannot hold the copies.
    """
    place = Path(tempfile.gettempdir())
    remove_leftovers(place)
    need, free = sum(ref.size_bytes for ref in refs), shutil.disk_usage(place).free
    if need > free:
        raise OutputError(
            f"a private copy takes {need / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB free", hint=HINT
        )
    with _locked_folder(place) as folder:
        for ref in refs:
            target = folder / ref.path
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle / ref.path, target)
            except OSError as e:
                raise output_error(target, e, HINT) from e
        try:
            check_files(folder, refs)
        except BundleError as e:
            raise BundleError(
                f"{bundle} was changed while it was copied: {e}", hint="find out who writes into the bundle"
            ) from e
        yield folder


def remove_leftovers(place: Path) -> None:
    """Remove the folders of this user's processes that were killed while they copied."""
    if os.name != "posix":
        return
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # BlockingIOError: its process is alive
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            lock = _lock(folder, wait=False)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def remove_own() -> None:
    """Remove the folders of this process, which ends at once while a thread of it may be copying."""
    for folder in list(_in_use):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked_folder(place: Path) -> Iterator[Path]:
    """A new folder, removed after the block, whose lock says that its process is alive."""
    folder, lock = _new_folder(place)
    _in_use.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        _in_use.discard(folder)


def _new_folder(place: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        with suppress(FileNotFoundError):
            lock = _lock(folder, wait=True)
            if folder.exists():
                return folder, lock
            os.close(lock)
        # Another process took it for a leftover before it was locked.


def _lock(folder: Path, *, wait: bool) -> int:
    """Lock a folder. The lock lasts until the descriptor that is returned is closed.

    Raises:
        BlockingIOError: another process has locked it, and the caller does not wait.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
