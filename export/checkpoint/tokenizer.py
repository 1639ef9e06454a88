"""A checkpoint's tokenizer, as diffusers loads it: by the class that model_index.json names."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer as RustTokenizer

from ditc.export.checkpoint.json_files import read_json
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.vocabulary import TOKENIZER_JSON, check_vocabulary_files
from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.integrity import file_ref
from ditc.runtime.bundle.manifest import FileRef
from ditc.runtime.errors import CheckpointError
from ditc.runtime.text import PaddingSide, TextSpec
from ditc.runtime.tokenizer_json import (
    LARGEST_FILE,
    Unbounded,
    check_special_tokens,
    encode,
    read_bounded,
    rust_errors,
)

ROLES = ("bos", "eos", "pad", "unk")
SETTINGS = "tokenizer_config.json"
# Numbers of tokens that a class adds, in its settings. T5 adds 100.
MOST_ADDED = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTokenizer:
    """What a bundle and the checks of a build need to know about one tokenizer.

    Attributes:
        directory: its folder, whose name is the component's.
        rust: the Rust tokenizer behind the class. It can differ from the tokenizer.json on disk: on loading,
            transformers 5 rebuilds the normalizer and the pre-tokenizer by class (GemmaTokenizer turns spaces into
            U+2581 whatever the file says), so the ids from the file can differ from those that the pipeline saw.
        vocabulary: token -> id, without the tokens that were added to the vocabulary later.
        added: token -> id of those added tokens.
        special_ids: the ids of bos, eos, pad and unk, as far as the tokenizer has these tokens.
        pad_token_id, padding_side, model_max_length: what a pipeline pads with, where, and the length in tokens that it
            takes from the tokenizer.
    """

    directory: Path
    rust: RustTokenizer
    vocabulary: Mapping[str, int]
    added: Mapping[str, int]
    special_ids: Mapping[str, int]
    pad_token_id: int
    padding_side: PaddingSide
    model_max_length: int

    @property
    def json(self) -> str:
        """The content of the bundle's tokenizer.json."""
        return self.rust.to_str()

    def ids(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens around it.

        Raises:
            CheckpointError: the tokenizer fails, or the text is far too long.
        """
        with rust_errors(self._failed):
            return list(encode(self.rust, text).ids)

    def _failed(self, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"the tokenizer in {self.directory} fails: {error}",
            hint="use the tokenizer that the text encoder was published with, and a complex_human_instruction of a "
            "few thousand characters at most",
        )


def read_tokenizer(checkpoint: Checkpoint, name: str) -> CheckpointTokenizer:
    """Read the tokenizer of that name, such as "tokenizer_2".

    Raises:
        CheckpointError: the checkpoint has no such tokenizer, its folder holds no vocabulary, it cannot be loaded, it
            has no Rust implementation or no pad token, or it cuts long texts on the left.
    """
    tokenizer = load_tokenizer(checkpoint, name)
    directory = checkpoint.tokenizers[name]
    with rust_errors(lambda error: _unusable(directory, f"has special tokens that have no id: {error}")):
        special = {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES}
    if special["pad"] is None:
        raise CheckpointError(
            f"{directory} has no pad token",
            hint="use the tokenizer that the text encoder was published with, or set pad_token in "
            f"{directory / 'tokenizer_config.json'}",
        )
    limit = tokenizer.model_max_length
    if not isinstance(limit, int | float) or not 1 <= limit < math.inf:
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'} says model_max_length {limit!r}, not a number of tokens",
            hint="fetch the file again",
        )
    if tokenizer.truncation_side != "right":
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'} says truncation_side {tokenizer.truncation_side!r}, but bundles "
            "cut long texts on the right",
            hint="with truncation_side 'right', texts that are longer than the limit lose their end, not their start",
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    return CheckpointTokenizer(
        directory=directory,
        rust=backend,
        vocabulary=vocabulary,
        added={token: i for token, i in tokenizer.get_added_vocab().items() if token not in vocabulary},
        special_ids={role: int(token) for role, token in special.items() if token is not None},
        pad_token_id=int(special["pad"]),
        padding_side=PaddingSide(tokenizer.padding_side),
        model_max_length=int(limit),
    )


def load_tokenizer(checkpoint: Checkpoint, name: str) -> Any:
    """Load the tokenizer of that name with transformers, by the class that model_index.json names.

    Like diffusers, this ignores the class that tokenizer_config.json names.

    Raises:
        CheckpointError: the checkpoint has no such tokenizer, its folder holds no vocabulary, it cannot be loaded, or
            it has no Rust implementation.
    """
    if name not in checkpoint.tokenizers:
        raise CheckpointError(
            f"{checkpoint.path} has no {name}: model_index.json names no tokenizer of that name",
            hint="add the folder and the entry in model_index.json: prompts cannot be read without it",
        )
    directory = checkpoint.tokenizers[name]
    kind = _class_of(checkpoint, name)
    check_vocabulary_files(directory, kind.vocab_files_names.values())
    problem = f"holds no tokenizer that transformers can load as a {kind.__name__}"
    with rust_errors(lambda error: _unusable(directory, f"{problem}: {error}")):
        _check_bounded(directory)
        tokenizer = kind.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        # Tokenizers without a Rust implementation raise here.
        check_special_tokens(tokenizer.backend_tokenizer)
    return tokenizer


def write_tokenizer(checkpoint: Checkpoint, spec: TextSpec, bundle: Path) -> FileRef:
    """Write the tokenizer of `spec` into the bundle, under a name that contains a hash of its content.

    A rebuilt bundle thus keeps the old tokenizer's file until the new manifest is written.
    """
    folder = (bundle / spec.tokenizer).parent
    text = read_tokenizer(checkpoint, folder.name).json
    path = folder / f"tokenizer-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomic(path, text)
    return file_ref(path, bundle)


def _unusable(directory: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{directory} {problem}",
        hint="fetch the folder again, or save it with the tokenizer's save_pretrained",
    )


def _check_bounded(directory: Path) -> None:
    """Refuse files from which transformers would make a tokenizer that fills the memory."""
    for path in directory.iterdir():
        if path.is_file() and path.stat().st_size > LARGEST_FILE:
            raise Unbounded(f"{path.name} has {path.stat().st_size} bytes, and {LARGEST_FILE} are the most")
    if (directory / TOKENIZER_JSON).is_file():
        read_bounded(directory / TOKENIZER_JSON)
    if (directory / SETTINGS).is_file():
        for name, value in read_json(directory / SETTINGS).items():
            # T5's extra_ids is the number of tokens that are added; model_max_length may be 1e30 for no limit.
            if name != "model_max_length" and isinstance(value, int) and value > MOST_ADDED:
                raise Unbounded(f"{SETTINGS} says {name} = {value}, and {MOST_ADDED} are the most")


def _class_of(checkpoint: Checkpoint, name: str) -> Any:
    """The class of transformers that model_index.json names for the tokenizer."""
    library, class_name = checkpoint.model_index[name]
    kind = getattr(transformers, class_name, None) if library == "transformers" else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
        raise CheckpointError(
            f"model_index.json names {library}.{class_name} for {name}, which is not a tokenizer of transformers "
            f"{transformers.__version__}",
            hint="name the class that the tokenizer was saved from, such as the tokenizer_class in "
            f"{checkpoint.tokenizers[name] / 'tokenizer_config.json'}",
        )
    return kind
