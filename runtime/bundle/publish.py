"""Upload a bundle to the hub: what its manifest lists, after its hashes were checked, in one commit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditc.runtime.bundle.card import model_card
from ditc.runtime.bundle.certificate import CERTIFICATE, load_certificate, read_certificate
from ditc.runtime.bundle.integrity import check_bundle, file_ref
from ditc.runtime.bundle.manifest import MANIFEST, FileRef, load_manifest
from ditc.runtime.bundle.signature import SIGNATURE
from ditc.runtime.errors import BundleError, UsageError
from ditc.runtime.hub import HubId, check_library, progress_bars, refusals, unreachable

CARD = "README.md"
# What a repository may hold that is not a bundle yet. The hub makes .gitattributes by itself.
EMPTY = {CARD, ".gitattributes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """What was uploaded.

    Attributes:
        url: the commit's page.
        files: every file of the bundle, as it is on the hub now.
        wrote_card: whether the model card is new. A card that is there already is kept.
    """

    url: str
    commit: str
    digest: str
    files: tuple[FileRef, ...]
    wrote_card: bool

    @property
    def total_bytes(self) -> int:
        return sum(ref.size_bytes for ref in self.files)


def push(
    bundle: Path,
    hub_id: HubId,
    *,
    private: bool = False,
    announce: Callable[[tuple[FileRef, ...]], None] = lambda files: None,
) -> Push:
    """Check the bundle, make the repository if there is none, and upload the bundle in one commit.

    Nothing on the hub is deleted. Files of an older bundle that stay there are not fetched, as no manifest lists them.

    Args:
        hub_id: its revision is a branch, which is made if there is none.
        private: make a new repository private.
        announce: is called with the files before the upload.

    Raises:
        BundleError: the bundle is damaged, the repository holds something else, or the hub refuses or fails.
        UsageError: the revision is a commit.
        MissingExtra: huggingface_hub is not installed.
    """
    check_library()
    if hub_id.is_commit:
        raise UsageError(f"{hub_id.revision} is a commit, which cannot change", hint="name a branch, or none")
    manifest = load_manifest(bundle)
    listed = tuple(manifest.all_files())
    check_bundle(bundle, manifest)
    files = (file_ref(bundle / MANIFEST, bundle), *_beside(bundle, manifest.digest), *listed)
    announce(files)
    try:
        with refusals(hub_id), progress_bars():
            present = _repository(hub_id, private=private)
            card = (
                None if CARD in present else model_card(manifest, load_certificate(bundle, manifest), hub_id)
            )
            return _commit(bundle, hub_id, files, card, manifest.digest)
    except unreachable() as e:
        message = str(e).strip().splitlines() or [type(e).__name__]
        raise BundleError(
            f"{hub_id} could not be pushed: {message[0]}",
            hint="check the network, the id and the token (`hf auth login` with write access), then push again",
        ) from e


def _beside(bundle: Path, digest: str) -> list[FileRef]:
    """Signature and certificate, each if it is there and about this manifest.

    Raises:
        BundleError: one is of another manifest, or the certificate was changed after it was written.
    """
    found = []
    for name, key in ((SIGNATURE, "digest"), (CERTIFICATE, "manifest")):
        path = bundle / name
        try:
            fits = path.is_file() and json.loads(path.read_bytes())[key] == digest
        except (ValueError, KeyError, TypeError, RecursionError):
            fits = False
        if fits:
            if name == CERTIFICATE:
                read_certificate(bundle)
            found.append(file_ref(path, bundle))
        elif path.exists():
            raise BundleError(
                f"{path} does not belong to the manifest {digest[:12]}",
                hint="remove it, or make it again with ditc sign or ditc parity",
            )
    return found


def _repository(hub_id: HubId, *, private: bool) -> set[str]:
    """The names of the files in the repository and branch, which are made if there are none.

    Raises:
        BundleError: the repository holds something that is not a bundle.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        present = _names(api, hub_id.repo, None)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(hub_id.repo, private=private)
        present = set()
    if present - EMPTY and MANIFEST not in present:
        raise BundleError(
            f"{hub_id.repo} on the hub holds something else than a bundle, such as {min(present - EMPTY)}",
            hint="push to an id of its own",
        )
    if hub_id.revision is None:
        return present
    try:
        return _names(api, hub_id.repo, hub_id.revision)
    except RevisionNotFoundError:
        api.create_branch(hub_id.repo, branch=hub_id.revision)
        return present


def _names(api: Any, repo: str, revision: str | None) -> set[str]:
    return {file.rfilename for file in api.model_info(repo, revision=revision).siblings or ()}


def _commit(bundle: Path, hub_id: HubId, files: tuple[FileRef, ...], card: str | None, digest: str) -> Push:
    from huggingface_hub import CommitOperationAdd, HfApi

    api, operations = HfApi(), []
    for ref in files:
        operation = CommitOperationAdd(ref.path, str(bundle / ref.path))
        if operation.upload_info.sha256.hex() != ref.sha256:  # the hub's client hashes what it uploads
            raise BundleError(f"{bundle}: {ref.path} was changed while it was pushed", hint="push again")
        operations.append(operation)
    if card is not None:
        operations.append(CommitOperationAdd(CARD, card.encode()))
    commit = api.create_commit(
        hub_id.repo, operations, commit_message=f"ditc bundle {digest[:12]}", revision=hub_id.revision
    )
    lacking = {ref.path for ref in files} - _names(api, hub_id.repo, commit.oid)
    if lacking:  # a .gitignore in the repository makes the client leave files out
        raise BundleError(
            f"{hub_id}: the hub has no {min(lacking)} after the upload",
            hint="remove the repository's .gitignore, and push again",
        )
    return Push(
        url=str(commit.commit_url), commit=commit.oid, digest=digest, files=files, wrote_card=card is not None
    )
