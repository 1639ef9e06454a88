"""A checkpoint's tokenizer as the tokenizer.json that transformers really uses."""

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
    """The Rust tokenizer behind the class that tokenizer_config.json names, serialised.

    Not the file on disk: transformers 5 rebuilds normalizer and pre-tokenizer by class on loading (GemmaTokenizer
    turns spaces into U+2581 whatever the file says), so the file can give other ids than the pipeline saw.

    Raises:
        CheckpointError: no tokenizer, or one without a Rust implementation.
    """
    backend = _load(directory).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    text: str = backend.to_str()
    return text


def write_tokenizer(directories: Mapping[str, Path], spec: TextSpec, bundle: Path) -> FileRef:
    """The tokenizer of `spec` under a name of its content: until a manifest names it, the old one keeps its file.

    Args:
        directories: the checkpoint's, by component.
    """
    folder = (bundle / spec.tokenizer).parent
    text = tokenizer_json(directories[folder.name])
    path = folder / f"tokenizer-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomic(path, text)
    return file_ref(path, bundle)


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What tokenizer_config.json says beside the vocabulary."""

    pad_token_id: int
    model_max_length: int


def tokenizer_facts(directory: Path) -> TokenizerFacts:
    """The padding and the length that a pipeline uses with the tokenizer of this directory.

    Raises:
        CheckpointError: no tokenizer, or one without a pad token.
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
            hint="tokenizer.json and tokenizer_config.json are needed",
        ) from e
    return tokenizer
