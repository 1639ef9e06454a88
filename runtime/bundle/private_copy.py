"""Copies of a bundle's files that nobody else can write to: what was hashed is then what a library opens and maps."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ditc.runtime.atomic import output_error
from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import FileRef
from ditc.runtime.errors import BundleError, OutputError, UsageError

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
    need, free = sum(ref.size_bytes for ref in refs), shutil.disk_usage(place).free
    if need > free:
        raise OutputError(
            f"a private copy takes {need / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB free", hint=HINT
        )
    with tempfile.TemporaryDirectory(prefix="ditc-", dir=place, ignore_cleanup_errors=True) as name:
        folder = Path(name)
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
