"""Bundles on the node of a replica: at the path that the front names or, if it is not there, fetched from the front.

    <the user's folder for caches>/ditc/bundles/files/<sha256>     each file once, whatever bundles it belongs to
    <the user's folder for caches>/ditc/bundles/<digest>/          a bundle: its manifest, and links to its files

A bundle is named by the digest of its manifest, which names its files by their hashes. So what is there under a digest
is the right one, or the check of the files at loading says that it is damaged. Nothing of the store is removed here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import filelock

from ditc.runtime.atomic import atomic_folder, atomic_path, write_atomic
from ditc.runtime.bundle.bench_record import BENCHMARK
from ditc.runtime.bundle.fetch import BESIDE, MAX_BESIDE_BYTES
from ditc.runtime.bundle.manifest import MANIFEST, FileRef, Manifest, load_manifest
from ditc.runtime.errors import BundleError, OutputError
from ditc.runtime.serving.replicas.messages import Version
from ditc.runtime.sessions.kernel_cache import cache_folder

# What one message carries: large enough that its overhead is small, and little memory on both sides.
PART_BYTES = 4 * 1024**2
HINT = "let XDG_CACHE_HOME name a folder on another disk of that node"


class Source(Protocol):
    """Reads files of a bundle where the front has it."""

    def read(self, path: str, offset: int) -> bytes | None:
        """Up to PART_BYTES of a file from an offset on; None if there is no such file. Raises BundleError."""
        ...


def read_part(bundle: str, path: str, offset: int) -> bytes | None:
    """What `Source.read` returns, on the machine that has the bundle."""
    with suppress(FileNotFoundError), (Path(bundle) / path).open("rb") as file:
        file.seek(offset)
        return file.read(PART_BYTES)
    return None


def place_of(bundle: Path, version: Version, source: Source) -> Path:
    """Where this version is on this node. It is fetched if neither the path nor the store has it.

    Args:
        bundle: where it would be.

    Raises:
        BundleError: the front's bundle has become another version, or cannot be read.
        OutputError: the store cannot be written.
    """
    with suppress(BundleError):
        if load_manifest(bundle).digest == version.digest:
            return bundle
    return fetched(store(), version, source)


def store() -> Path:
    """The folder of the store. Raises OutputError if this user has no folder for caches."""
    caches = cache_folder()
    if caches is None:
        raise OutputError(
            "a bundle cannot be fetched to this node, because its user has no folder for caches", hint=HINT
        )
    return caches.with_name("bundles")


def fetched(folder: Path, version: Version, source: Source) -> Path:
    """The bundle in a store, into which what it lacks is fetched. Of several replicas of a node, one fetches it.

    Raises:
        BundleError, OutputError: as `place_of`.
    """
    bundle = folder / version.digest
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f"{version.digest}.lock")
        lock.acquire()
    except OSError as e:
        raise OutputError(f"cannot write {folder}: {e.strerror or e}", hint=HINT) from e
    try:
        if not (bundle / MANIFEST).is_file():
            with atomic_folder(bundle, hint=HINT) as partial:
                _fill(partial, folder / "files", version, source)
    finally:
        lock.release()
    return bundle


def check_version(bundle: Path | str, version: Version, digest: str) -> None:
    """Raise BundleError unless the digest of a bundle's manifest is that of the version."""
    if digest != version.digest:
        raise BundleError(
            f"{bundle} is at version {digest[:12]} now, and {version} is served",
            hint="reload it: POST /admin/reload, or SIGHUP",
        )


def _fill(partial: Path, files: Path, version: Version, source: Source) -> None:
    """Write a bundle's manifest, what is beside it, and its files, each of which is hashed as it comes."""
    manifest = _manifest(partial, version, source)
    missing = {ref.sha256: ref for ref in manifest.all_files() if not (files / ref.sha256).is_file()}
    need, free = sum(ref.size_bytes for ref in missing.values()), shutil.disk_usage(files.parent).free
    if need > free:
        raise OutputError(
            f"{version} takes {need / 1e9:.1f} GB, and {files.parent} has {free / 1e9:.1f} GB free", hint=HINT
        )
    for ref in missing.values():
        _fetch(ref, files / ref.sha256, source)
    for ref in manifest.all_files():
        target = partial / ref.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():  # two stages may share a file
            _link(files / ref.sha256, target)
    for name in (*BESIDE, BENCHMARK):
        content = _whole(name, source)
        if content is not None:
            write_atomic(partial / name, content)


def _manifest(partial: Path, version: Version, source: Source) -> Manifest:
    content = _whole(MANIFEST, source)
    if content is None:
        raise BundleError(f"{version} is not there any more", hint="build it again, and reload it")
    write_atomic(partial / MANIFEST, content)
    manifest = load_manifest(partial)
    check_version("the front's bundle", version, manifest.digest)
    return manifest


def _whole(path: str, source: Source) -> bytes | None:
    """A small file that no manifest lists."""
    content = b""
    while True:
        part = source.read(path, len(content))
        if part is None:
            return None
        content += part
        if len(content) > MAX_BESIDE_BYTES:
            raise BundleError(
                f"{path} of the bundle is larger than {MAX_BESIDE_BYTES} bytes", hint="build it again"
            )
        if len(part) < PART_BYTES:
            return content


def _fetch(ref: FileRef, target: Path, source: Source) -> None:
    """Write a file of the manifest, if it has the size and the hash that the manifest says."""
    found, size = hashlib.sha256(), 0
    with atomic_path(target, hint=HINT) as partial:
        with partial.open("wb") as file:
            while size < ref.size_bytes:
                part = source.read(ref.path, size)
                if not part:
                    break
                found.update(part)
                file.write(part)
                size += len(part)
        if size != ref.size_bytes or found.hexdigest() != ref.sha256:
            raise BundleError(
                f"{ref.path} of the front's bundle is not what its manifest says: it has been changed or truncated",
                hint="check it where the front runs: ditc verify BUNDLE",
            )


def _link(stored: Path, target: Path) -> None:
    try:
        os.link(stored, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(stored, target)
