"""A checkpoint's tokenizer as the tokenizer.json that transformers really uses."""

from __future__ import annotations

from pathlib import Path

from ditc.runtime.errors import CheckpointError


def tokenizer_json(directory: Path) -> str:
    """The Rust tokenizer behind the class that tokenizer_config.json names, serialised.

    Not the file on disk: transformers 5 rebuilds normalizer and pre-tokenizer by class on loading (GemmaTokenizer
    turns spaces into U+2581 whatever the file says), so the file can give other ids than the pipeline saw.

    Raises:
        CheckpointError: no tokenizer, or one without a Rust implementation.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, AttributeError, KeyError) as e:
        raise CheckpointError(
            f"{directory} holds no tokenizer that transformers can load: {e}",
            hint="tokenizer.json and tokenizer_config.json are needed",
        ) from e
    backend.no_truncation()
    backend.no_padding()
    text: str = backend.to_str()
    return text
