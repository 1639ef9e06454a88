"""Prompts to token ids, as data says: what is done to a text before its encoder, and to the states after it.

Reproduces the prompt handling of diffusers' pipelines (encode_prompt, 0.42.1) from a TextSpec:

    lower, strip -> prefix + text -> tokenize, cut on the right at max_length, pad -> text encoder
    -> select positions of states and mask -> conditioner
"""

# B texts, S tokens of the encoder's input, L tokens that reach the conditioner

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ditc.runtime.errors import BundleError, UsageError
from ditc.runtime.session import Array

log = logging.getLogger(__name__)


class PaddingSide(StrEnum):
    """Where pad tokens go."""

    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True, slots=True)
class Select:
    """Positions that reach the conditioner: the first `first` and the last `last` of S.

    With an instruction before the prompt: <bos>, and the prompt without the instruction.
    """

    first: int
    last: int

    def __call__(self, tensor: Array) -> Array:
        """The selected positions of a (B,S,...) tensor."""
        length = tensor.shape[1]
        return np.concatenate([tensor[:, : self.first], tensor[:, length - self.last :]], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """What one text encoder is fed, and which of its states are used.

    Attributes:
        stage: the encoder's stage.
        tokenizer: path of its tokenizer.json inside the bundle.
        length: L, the same for both kinds of prompt.
        max_length, negative_max_length: S for a prompt and a negative prompt, special tokens included.
        prefix, negative_prefix: text put before every prompt, such as an instruction to a language model.
        select, negative_select: which states are used; None for all.
        lower, strip: what is done to a prompt, in this order, before its prefix. Prefixes stay as they are.
        mask: the conditioner's input that takes the selected attention mask; None where it takes none.

    Raises:
        ValueError: lengths that do not fit each other.
    """

    stage: str
    tokenizer: str
    length: int
    max_length: int
    negative_max_length: int
    pad_token_id: int
    prefix: str = ""
    negative_prefix: str = ""
    select: Select | None = None
    negative_select: Select | None = None
    lower: bool = False
    strip: bool = False
    padding_side: PaddingSide = PaddingSide.RIGHT
    mask: str | None = None

    def __post_init__(self) -> None:
        for length, select in (
            (self.max_length, self.select),
            (self.negative_max_length, self.negative_select),
        ):
            selected = length if select is None else select.first + select.last
            if selected != self.length or not 0 < selected <= length:
                raise ValueError(f"{selected} of {length} tokens are selected, length is {self.length}")


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Input of a text encoder: both (B,S) int64."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]


class Tokenizer:
    """A tokenizer.json. Safe to share between threads: nothing changes after construction.

    Raises:
        BundleError: the file is missing or is no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers 0.23 raises bare Exception for malformed files
            raise BundleError(f"{path} is no tokenizer: {error}", hint="rebuild the bundle") from error
        # A tokenizer.json that transformers saved may carry the truncation and padding of its last call.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special_tokens = self._tokenizer.num_special_tokens_to_add(is_pair=False)

    def encode(self, texts: Sequence[str], spec: TextSpec, *, negative: bool = False) -> TokenBatch:
        """Token ids and mask of every text, cut (with a warning in the log) and padded to the spec's length.

        Raises:
            UsageError: a prompt that is no Unicode text.
        """
        prefix = spec.negative_prefix if negative else spec.prefix
        length = spec.negative_max_length if negative else spec.max_length
        input_ids = np.full((len(texts), length), spec.pad_token_id, np.int64)
        attention_mask = np.zeros((len(texts), length), np.int64)
        for row, text in enumerate(texts):
            ids = self._ids(prefix + _prepared(text, spec), length, spec.stage)
            start = 0 if spec.padding_side == PaddingSide.RIGHT else length - len(ids)
            input_ids[row, start : start + len(ids)] = ids
            attention_mask[row, start : start + len(ids)] = 1
        return TokenBatch(input_ids, attention_mask)

    def _ids(self, text: str, length: int, stage: str) -> list[int]:
        """At most `length` ids. The text is cut before special tokens are added, so <eos> survives a cut."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        room = length - self._special_tokens
        if len(encoding.ids) > room:
            cut = self._tokenizer.decode(encoding.ids[room:], skip_special_tokens=False)
            # Vocabularies that mark the ends of words have no decoder that turns the mark into a space.
            cut = cut.replace(getattr(self._tokenizer.model, "end_of_word_suffix", None) or " ", " ").strip()
            log.warning(
                "%s has room for %d tokens; the end of this prompt is left out: %r", stage, length, cut
            )
            encoding.truncate(room)
        return list(self._tokenizer.post_process(encoding).ids)

    @staticmethod
    def select(
        states: Mapping[str, Array], mask: NDArray[np.int64], spec: TextSpec, *, negative: bool = False
    ) -> tuple[dict[str, Array], NDArray[np.int64]]:
        """The states and the mask (B,S) at the positions that reach the conditioner.

        Args:
            states: the encoder's named outputs; those without a token axis, (B,D), stay as they are.
        """
        select = spec.negative_select if negative else spec.select
        if select is None:
            return dict(states), mask
        return {name: select(t) if t.ndim > 2 else t for name, t in states.items()}, select(mask)


def _prepared(text: str, spec: TextSpec) -> str:
    if not isinstance(text, str):
        raise UsageError(f"a prompt is {text!r:.60}, not text", hint="pass a str or a list of str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt {text!r:.60} is not valid Unicode: {error.reason} at position {error.start}",
            hint="it was probably cut inside a character: decode it as UTF-8",
        ) from error
    text = text.lower() if spec.lower else text
    return text.strip() if spec.strip else text
