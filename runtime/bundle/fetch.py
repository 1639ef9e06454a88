"""Fetch a bundle from the hub into huggingface_hub's cache: the manifest first, then only the files that it lists.

The cache keeps each file once, under a name that the hub gives, and a folder of links per commit, which is the bundle.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ditc.runtime.atomic import output_error
from ditc.runtime.bundle.certificate import CERTIFICATE
from ditc.runtime.bundle.integrity import check_bundle
from ditc.runtime.bundle.manifest import MANIFEST, FileRef, Manifest, load_manifest
from ditc.runtime.bundle.signature import SIGNATURE
from ditc.runtime.errors import BundleError, OutputError
from ditc.runtime.hub import HubId, check_library, find_hub_id, progress_bars, refusals, unreachable

log = logging.getLogger(__name__)

# Not listed in the manifest, because they are about it. The largest that is fetched: a real manifest has 30 kB.
BESIDE = (SIGNATURE, CERTIFICATE)
MAX_BESIDE_BYTES = 64 * 1024**2
CACHE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
CACHE_HINT = "let HF_HUB_CACHE name a folder on another disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """What a bundle on the hub has, and what of it is missing in the cache.

    Attributes:
        folder: the bundle in the cache; when it is announced, its files may still be missing.
        commit: the commit of the repository.
        missing: the files that are fetched.
    """

    hub_id: HubId
    folder: Path
    commit: str
    manifest: Manifest
    missing: tuple[FileRef, ...]

    @property
    def missing_bytes(self) -> int:
        return sum(ref.size_bytes for ref in self.missing)

    @property
    def total_bytes(self) -> int:
        return sum(ref.size_bytes for ref in self.manifest.all_files())

    def __str__(self) -> str:
        files = len(list(self.manifest.all_files()))
        return (
            f"{self.hub_id.repo}@{self.commit[:12]}: {files} files, {self.total_bytes / 1e6:.1f} MB; "
            f"to fetch: {len(self.missing)} files, {self.missing_bytes / 1e6:.1f} MB"
        )


def local_bundle(
    source: str | Path, *, announce: Callable[[Fetch], None] = lambda fetch: None, whole: bool = True
) -> Path:
    """The folder of a bundle: the path itself, or, for a hub id, its folder in the cache after it was fetched.

    Args:
        announce: is called with the sizes before the files are fetched.
        whole: fetch all files; otherwise only the manifest and what is said about it.

    Raises:
        BundleError: the hub has no such bundle, it is incomplete, or it can neither be reached nor found in the cache.
        OutputError: the cache's disk has too little space.
        MissingExtra: huggingface_hub is not installed.
    """
    hub_id = find_hub_id(source)
    return Path(source) if hub_id is None else fetch(hub_id, announce=announce, whole=whole).folder


def fetch(
    hub_id: HubId, *, announce: Callable[[Fetch], None] = lambda fetch: None, whole: bool = True
) -> Fetch:
    """Fetch what the cache lacks of a bundle. The hashes are checked by whoever reads the files (`check_fetched`).

    A commit that is in the cache as a whole is not asked for again. If the hub cannot be reached, the cache is used.
    Arguments and errors are those of `local_bundle`.
    """
    check_library()
    if hub_id.is_commit and (cached := _cached(hub_id)) is not None and not cached.missing:
        return cached
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        with refusals(hub_id), progress_bars():
            info = HfApi().model_info(hub_id.repo, revision=hub_id.revision, files_metadata=True)
            sizes = {file.rfilename: file.size for file in info.siblings or ()}
            found = _fetch_manifest(hub_id, str(info.sha), sizes)
            if whole:
                _check_listed(found, sizes)
                log.info("%s", found)
                announce(found)
                for ref in found.missing:
                    _download(hub_id, ref.path, found.commit)
    except unreachable() as e:
        if isinstance(e, OSError) and e.errno in CACHE_ERRORS:
            raise output_error(Path(e.filename or HF_HUB_CACHE), e, CACHE_HINT) from e
        cached = _cached(hub_id)
        if cached is None or (whole and cached.missing):
            raise _not_fetched(hub_id, cached, e) from e
        return cached
    return found


def check_fetched(found: Fetch, done: Callable[[FileRef], None] | None = None) -> None:
    """Hash every file of a fetched bundle. Raises BundleError, which names the file that differs."""
    check_bundle(found.folder, found.manifest, done=done)


def _fetch_manifest(hub_id: HubId, commit: str, sizes: dict[str, int | None]) -> Fetch:
    if MANIFEST not in sizes:
        raise BundleError(
            f"{hub_id} on the hub is not a bundle: it has no {MANIFEST}",
            hint="a checkpoint becomes a bundle with ditc build ORG/NAME -o BUNDLE",
        )
    for name in (MANIFEST, *BESIDE):
        if (sizes.get(name) or 0) > MAX_BESIDE_BYTES:
            message = f"{hub_id}: {name} has {sizes[name]} bytes, and at most {MAX_BESIDE_BYTES} are fetched"
            raise BundleError(message, hint="do not use this bundle")
    # By the name of the branch, which the cache then knows without the hub.
    folder = _download(hub_id, MANIFEST, hub_id.revision).parent
    if folder.name != commit:
        raise BundleError(f"{hub_id} was changed while it was fetched", hint="fetch it again")
    for name in BESIDE:
        if name in sizes:
            _download(hub_id, name, commit)
    return _in_cache(hub_id, folder, commit)


def _download(hub_id: HubId, name: str, commit: str | None, *, local: bool = False) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(hub_id.repo, name, revision=commit, local_files_only=local))


def _in_cache(hub_id: HubId, folder: Path, commit: str) -> Fetch:
    manifest = load_manifest(folder)
    missing = tuple(ref for ref in manifest.all_files() if not (folder / ref.path).is_file())
    return Fetch(hub_id=hub_id, folder=folder, commit=commit, manifest=manifest, missing=missing)


def _cached(hub_id: HubId) -> Fetch | None:
    """What the cache has of a bundle, without the hub."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _download(hub_id, MANIFEST, hub_id.revision, local=True).parent
    except LocalEntryNotFoundError:
        return None
    return _in_cache(hub_id, folder, folder.name)


def _check_listed(found: Fetch, sizes: dict[str, int | None]) -> None:
    """Before anything large is fetched: the hub has every file, in the size of the manifest, and there is space."""
    for ref in found.missing:
        if ref.path not in sizes:
            raise BundleError(
                f"{found.hub_id} on the hub is incomplete: it has no {ref.path}",
                hint="ask its owner to push it again with ditc push",
            )
        size = sizes[ref.path]
        if size is not None and size != ref.size_bytes:
            raise BundleError(
                f"{found.hub_id}: {ref.path} has {size} bytes on the hub, but the manifest says {ref.size_bytes}",
                hint="ask its owner to push it again with ditc push",
            )
    free = shutil.disk_usage(found.folder).free
    if free < found.missing_bytes:
        raise OutputError(
            f"{found.hub_id} needs {found.missing_bytes / 1e6:.1f} MB, but {found.folder} has {free / 1e6:.1f} MB free",
            hint=f"free some space, or {CACHE_HINT}",
        )


def _not_fetched(hub_id: HubId, cached: Fetch | None, cause: Exception) -> BundleError:
    have = "it is not in the cache" if cached is None else f"the cache lacks {cached.missing[0].path}"
    return BundleError(
        f"cannot fetch {hub_id}: there is no such path here, {have}, and the hub cannot be reached "
        f"({type(cause).__name__})",
        hint=f"on a machine with a network: ditc pull {hub_id} -o DIR; then copy the folder here",
    )
