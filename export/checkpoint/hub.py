"""Fetch a checkpoint by its hub id: the data files of a model repository, through huggingface_hub's cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ditc.export.checkpoint.vocabulary import SENTENCEPIECE_FILES
from ditc.runtime.errors import CheckpointError, MissingExtra

# org/name or org/name@revision, as huggingface_hub validates them.
HUB_ID = re.compile(r"(?:hf://)?(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")

# Weight files as diffusers and transformers name them, single or sharded. This leaves out the text encoders that
# SD3.5's repositories hold for other programs (text_encoders/t5xxl_fp16.safetensors): 15 GB that no diffusers
# pipeline reads.
WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model[^.]*\.safetensors(?:\.index\.json)?")
# Only data is fetched, never code or chat templates. The .txt files are CLIP's merges, and the .model files are the
# vocabularies of SentencePiece, which some tokenizers have in place of a tokenizer.json.
DATA_SUFFIXES = (".json", ".safetensors", ".txt", *SENTENCEPIECE_FILES)


def is_hub_id(source: str) -> bool:
    """Whether the text has the form of a hub id and is not an existing path."""
    return HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def fetch_snapshot(source: str, *, variant: str | None = None, cache_dir: Path | None = None) -> Path:
    """Fetch what the local cache lacks of a hub model, and return the model's folder in the cache.

    If the hub cannot be reached, the cached files are used.

    Raises:
        CheckpointError: the text is not a hub id, the hub has no such repository or refuses access, or the hub cannot
            be reached and the cache does not hold the model.
        MissingExtra: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    except ImportError as error:
        raise MissingExtra("huggingface-hub", "export") from error
    # OSError and the errors of the HTTP library, which is httpx or httpx2 depending on huggingface_hub's version.
    transport_errors = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source!r} is not a hub id", hint="write it as org/name or org/name@revision")
    repo, revision = match["repo"], match["revision"]
    try:
        files = wanted_files(HfApi().list_repo_files(repo, revision=revision), variant)
        return Path(
            snapshot_download(repo, revision=revision, cache_dir=cache_dir, allow_patterns=list(files))
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated", hint="accept its licence on the hub and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        hint = "check the id, or run `hf auth login`"
        raise CheckpointError(f"the hub has no model {repo}", hint=hint) from error
    except transport_errors as error:
        return _cached(repo, revision, cache_dir, error)


def wanted_files(files: Iterable[str], variant: str | None) -> tuple[str, ...]:
    """Choose the data files of a diffusers repository.

    A component that has weights of the variant gives those, and any other gives its default weights. Single-file
    checkpoints and other layouts at the top of the repository are left out.
    """
    data = [name for name in files if name.endswith(DATA_SUFFIXES) and name.count("/") <= 1]
    weights = [name for name in data if "/" in name and ".safetensors" in name]
    with_variant = {name.split("/")[0] for name in weights if variant and f".{variant}" in name}
    others = [name for name in data if name not in weights and not name.endswith(".safetensors")]
    chosen = [name for name in weights if _is_chosen(name, with_variant, variant)]
    return tuple(others + chosen)


def _is_chosen(name: str, with_variant: set[str], variant: str | None) -> bool:
    component, file = name.split("/")
    if component in with_variant:
        return f".{variant}" in file
    return WEIGHTS.fullmatch(file) is not None


def _cached(repo: str, revision: str | None, cache_dir: Path | None, cause: Exception) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # One file is enough to find the folder. open_checkpoint names whatever else is missing from it.
        folder = snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=["model_index.json"],
            local_files_only=True,
        )
        return Path(folder)
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"cannot fetch {repo}: no such folder here, no such model in the cache, and the hub cannot be "
            f"reached ({type(cause).__name__})",
            hint=f"on a machine with a network: hf download {repo}; then copy the folder or the cache here",
        ) from cause
