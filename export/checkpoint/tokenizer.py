"""A checkpoint's tokenizer, as the tokenizer.json that transformers really uses."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.integrity import file_ref
from ditc.runtime.bundle.manifest import FileRef
from ditc.runtime.errors import CheckpointError
from ditc.runtime.text import TextSpec


def tokenizer_json(directory: Path) -> str:
    """Serialise the Rust tokenizer behind the class that tokenizer_config.json names.

    The result can differ from the file on disk. On loading, transformers 5 rebuilds the normalizer and the
    pre-tokenizer by class (GemmaTokenizer turns spaces into U+2581 whatever the file says), so the ids from the file
    alone can differ from those that the pipeline saw.

    Raises:
        CheckpointError: the folder holds no tokenizer, or one without a Rust implementation.
    """
    backend = _load(directory).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    text: str = backend.to_str()
    return text


def write_tokenizer(directories: Mapping[str, Path], spec: TextSpec, bundle: Path) -> FileRef:
    """Write the tokenizer of `spec` into the bundle, under a name that contains a hash of its content.

    A rebuilt bundle thus keeps the old tokenizer's file until the new manifest is written.

    Args:
        directories: the checkpoint's tokenizer folders, by component.
        bundle: the bundle's directory.
    """
    folder = (bundle / spec.tokenizer).parent
    text = tokenizer_json(directories[folder.name])
    path = folder / f"tokenizer-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomic(path, text)
    return file_ref(path, bundle)


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What tokenizer_config.json says besides the vocabulary. model_max_length is in tokens."""

    pad_token_id: int
    model_max_length: int


def tokenizer_facts(directory: Path) -> TokenizerFacts:
    """The padding token and the length that a pipeline uses with the tokenizer of this folder.

    Raises:
        CheckpointError: the folder holds no tokenizer, or one without a pad token.
    """
    tokenizer = _load(directory)
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"{directory} has no pad token", hint="set pad_token in tokenizer_config.json")
    return TokenizerFacts(int(tokenizer.pad_token_id), int(tokenizer.model_max_length))


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        tokenizer.backend_tokenizer  # noqa: B018  tokenizers without a Rust implementation raise here
    except (OSError, ValueError, AttributeError, KeyError) as e:
        raise CheckpointError(
            f"{directory} holds no tokenizer that transformers can load: {e}",
            hint="the folder must hold tokenizer.json and tokenizer_config.json",
        ) from e
    return tokenizer
