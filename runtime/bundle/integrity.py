"""Hashes of a bundle's files: every file is checked before it is deserialised."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ditc.runtime.bundle.manifest import FileRef, Manifest, mend
from ditc.runtime.bundle.references import check_references
from ditc.runtime.errors import BundleError

log = logging.getLogger(__name__)


def file_ref(path: Path, bundle: Path) -> FileRef:
    """The reference to a file of the bundle, with its current hash and size."""
    return FileRef(path.relative_to(bundle).as_posix(), sha256(path), path.stat().st_size)


def sha256(path: Path) -> str:
    """The hash of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_bundle(bundle: Path, manifest: Manifest, *, done: Callable[[FileRef], None] | None = None) -> None:
    """Check every file of the manifest as `check_files` does, and that no artifact refers to files beside them.

    Without the second check, weights in such a file could be exchanged while all hashes still fit.

    Raises:
        BundleError: a file differs, or an artifact refers to a file that the manifest does not list.
    """
    check_files(bundle, manifest.all_files(), done=done)
    for artifact in (artifact for stage in manifest.stages.values() for artifact in stage.artifacts):
        check_references(bundle / artifact.file.path, artifact)


def check_files(
    bundle: Path, refs: Iterable[FileRef], *, done: Callable[[FileRef], None] | None = None
) -> None:
    """Compare the size and hash of every file. Several files are read in parallel, as hashlib releases the GIL.

    Args:
        done: is called after each file, from a worker thread.

    Raises:
        BundleError: a file is missing, truncated, changed, or no regular file. The message names it.
    """

    def check(ref: FileRef) -> None:
        check_file(bundle, ref)
        if done is not None:
            done(ref)

    with ThreadPoolExecutor(max_workers=4) as pool:
        for future in [pool.submit(check, ref) for ref in refs]:
            future.result()


def check_file(bundle: Path, ref: FileRef) -> None:
    """Raise BundleError unless the file is a regular file and has the size and hash in the manifest.

    It may be a link, as in the hub's cache, also to a place outside the bundle: its content is what counts.
    """
    path, hint = bundle / ref.path, mend(bundle)
    if not os.path.exists(path):  # noqa: PTH110 (Path.exists raises if a parent may not be searched)
        what = "is a link to nothing" if path.is_symlink() else "is missing"
        raise BundleError(f"{bundle}: {ref.path} {what}", hint=hint)
    if not path.is_file():  # looked up before it is opened, because opening a pipe waits for its writer
        raise BundleError(f"{bundle}: {ref.path} is not a regular file", hint=hint)
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f"{bundle}: {ref.path} is not a regular file", hint=hint)
        if found.st_size != ref.size_bytes:
            raise BundleError(
                f"{bundle}: {ref.path} has {found.st_size} bytes, but the manifest says {ref.size_bytes}",
                hint=hint,
            )
        if os.name == "posix" and found.st_mode & stat.S_IWOTH:
            log.warning(
                "%s: every user of this machine may change %s; forbid it with chmod o-w", bundle, ref.path
            )
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != ref.sha256:
        raise BundleError(
            f"{bundle}: {ref.path} has been changed: its sha256 is not the one in the manifest", hint=hint
        )
