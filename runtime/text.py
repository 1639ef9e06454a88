"""Prompts to token ids: what is done to a text before its encoder, and to the encoder's states after it.

A TextSpec in the manifest describes the prompt handling of a pipeline of diffusers (encode_prompt, 0.42.1):

    text + suffix -> lower, strip -> prefix + text -> tokenize, cut on the right at max_length, pad -> text encoder
    -> select positions of states and mask -> conditioner
"""

# B texts, S tokens of the encoder's input, L tokens that reach the conditioner

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from ditc.runtime.bundle.jsondata import LEFT_OUT_IF_NONE
from ditc.runtime.errors import BundleError, DitcError, UsageError
from ditc.runtime.session import Array
from ditc.runtime.tokenizer_json import Unbounded, encode, open_tokenizer, rust_errors

log = logging.getLogger(__name__)

MOTION_SCORE = "{motion_score}"
# Where padding has no effect, a text keeps so much of it that its number of tokens is a multiple of this. Libraries
# remember the kernels that they chose for the few sizes, and there is hardly more work than without any padding.
LENGTH_STEP = 32


class PaddingSide(StrEnum):
    """Where pad tokens go."""

    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True, slots=True)
class Select:
    """The positions that reach the conditioner: the first `first` and the last `last` of S.

    With an instruction before the prompt, they are <bos> and the prompt without the instruction.
    """

    first: int
    last: int

    def __call__(self, tensor: Array) -> Array:
        """The selected positions of a (B,S,...) tensor."""
        length = tensor.shape[1]
        return np.concatenate([tensor[:, : self.first], tensor[:, length - self.last :]], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """How texts are prepared for one text encoder, and which of its states are used.

    Attributes:
        stage: the encoder's stage.
        tokenizer: path of its tokenizer.json inside the bundle.
        length: L, the same for prompts and negative prompts.
        max_length, negative_max_length: S for prompts and for negative prompts, including special tokens.
        pad_token_id, padding_side: how shorter texts are padded to S tokens.
        prefix, negative_prefix: text put before every prompt, such as an instruction to a language model.
        select, negative_select: the positions whose states are used; None for all.
        lower, strip: whether a prompt is lower-cased and then stripped, before the prefix, which stays as it is.
        mask: the conditioner's input for the selected attention mask; None if it has no such input.
        vocab_size: number of rows of the encoder's embedding, which ids must stay below. Bundles that are older than
            this field have None.
        suffix: text put after every prompt, but not after negative prompts, before anything else is done with it.
        motion: the suffix for a request's motion_score, in which that number takes the place of MOTION_SCORE; None for
            models that were not trained with one.
        padding: what the conditioner's outputs hold for a token that the mask hides, by their names. Such a token has
            no effect on the picture, so padding may be left out of the computation, and rows of different lengths may
            be filled up with these values to share a run. None where padding has an effect.

    Raises:
        ValueError: the lengths do not fit each other.
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
    vocab_size: int | None = None
    suffix: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    motion: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    padding: tuple[tuple[str, float], ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)

    def __post_init__(self) -> None:
        for length, select in (
            (self.max_length, self.select),
            (self.negative_max_length, self.negative_select),
        ):
            selected = length if select is None else select.first + select.last
            if selected != self.length or not 0 < selected <= length:
                raise ValueError(f"{selected} of {length} tokens are selected, but length is {self.length}")


def with_length(spec: TextSpec, length: int) -> TextSpec:
    """The same handling with another number of tokens that reach the conditioner. An instruction keeps its room."""
    change = length - spec.length
    return replace(
        spec,
        length=length,
        max_length=spec.max_length + change,
        negative_max_length=spec.negative_max_length + change,
        select=_lengthened(spec.select, change),
        negative_select=_lengthened(spec.negative_select, change),
    )


def with_instruction(spec: TextSpec, lines: Sequence[str], tokenizer: Tokenizer) -> TextSpec:
    """The same handling with another text before every prompt, or with none.

    diffusers counts <bos> with the instruction, gives the text one more token of slack, and keeps the first position
    and the last ones.
    """
    if not lines:
        return replace(spec, prefix="", max_length=spec.length, select=None)
    prefix = "\n".join(lines)
    return replace(
        spec,
        prefix=prefix,
        max_length=tokenizer.count(prefix) + spec.length - 2,
        select=Select(first=1, last=spec.length - 1),
    )


def with_motion(spec: TextSpec, motion_score: int) -> TextSpec:
    """The same handling with the motion score after every prompt.

    Raises:
        UsageError: the model was not trained with one.
    """
    if spec.motion is None:
        raise UsageError(
            f"motion_score is {motion_score}, but this bundle's model was not trained with one",
            hint="leave motion_score out",
        )
    return replace(spec, suffix=spec.motion.replace(MOTION_SCORE, str(motion_score)))


def without_padding(spec: TextSpec, batch: TokenBatch, *, negative: bool) -> tuple[TextSpec, TokenBatch]:
    """The same texts with less padding after them, and their handling, if the spec says that padding has no effect.

    A causal encoder gives a token the same states whatever comes after it, and the mask hides what does.

    Returns:
        The spec with as many tokens as the longest text needs, a multiple of LENGTH_STEP or all of them; and (B,S) ids
        and mask for it.
    """
    if spec.padding is None or spec.mask is None or spec.padding_side is not PaddingSide.RIGHT:
        return spec, batch
    select = spec.negative_select if negative else spec.select
    mask = batch.attention_mask if select is None else select(batch.attention_mask)
    used = int(np.flatnonzero(mask.any(axis=0)).max(initial=0)) + 1
    length = min(spec.length, -(-used // LENGTH_STEP) * LENGTH_STEP)
    tokens = batch.input_ids.shape[1] - (spec.length - length)
    kept = TokenBatch(batch.input_ids[:, :tokens], batch.attention_mask[:, :tokens])
    return with_length(spec, length), kept


def _lengthened(select: Select | None, change: int) -> Select | None:
    return None if select is None else Select(select.first, select.last + change)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The inputs of a text encoder, both (B,S) int64."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]


class Tokenizer:
    """A tokenizer.json. Threads can share it, because nothing changes after construction.

    Raises:
        BundleError: the file is missing, is not a tokenizer, or could fill the memory.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._tokenizer = path, open_tokenizer(path)
        # A tokenizer.json that transformers saved may carry the truncation and padding of its last call.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special_tokens = self._tokenizer.num_special_tokens_to_add(is_pair=False)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, without the tokens that were added to the vocabulary later."""
        return self._tokenizer.get_vocab(with_added_tokens=False)

    def encode(self, texts: Sequence[str], spec: TextSpec, *, negative: bool = False) -> TokenBatch:
        """Token ids and mask of every text, padded or cut (with a warning in the log) to the spec's length.

        Raises:
            UsageError: a prompt is not text, is not valid Unicode, is far too long, or has a token that the text
                encoder does not know.
            BundleError: the tokenizer fails.
        """
        prefix = spec.negative_prefix if negative else spec.prefix
        length = spec.negative_max_length if negative else spec.max_length
        input_ids = np.full((len(texts), length), spec.pad_token_id, np.int64)
        attention_mask = np.zeros((len(texts), length), np.int64)
        for row, text in enumerate(texts):
            ids = self._ids(prefix + _prepared(text, spec, negative), length, spec.stage)
            self._check_known(ids, spec)
            start = 0 if spec.padding_side == PaddingSide.RIGHT else length - len(ids)
            input_ids[row, start : start + len(ids)] = ids
            attention_mask[row, start : start + len(ids)] = 1
        return TokenBatch(input_ids, attention_mask)

    def count(self, text: str) -> int:
        """The number of tokens of a text, with special tokens."""
        return len(self._encoding(text).ids)

    def _encoding(self, text: str, *, special_tokens: bool = True) -> Encoding:
        with rust_errors(self._failed):
            return encode(self._tokenizer, text, special_tokens=special_tokens)

    def _failed(self, error: BaseException) -> DitcError:
        if isinstance(error, Unbounded):
            return UsageError(str(error), hint="shorten it: the text encoder reads only its first tokens")
        return BundleError(f"{self._path} fails for this text: {error}", hint="rebuild the bundle")

    def _ids(self, text: str, length: int, stage: str) -> list[int]:
        """At most `length` ids. The text is cut before special tokens are added, so that <eos> is never cut off."""
        encoding = self._encoding(text, special_tokens=False)
        room = length - self._special_tokens
        if room < 0:
            raise UsageError(
                f"{stage} has room for {length} tokens, but every text gets {self._special_tokens} special ones",
                hint="use a larger max_sequence_length",
            )
        if len(encoding.ids) > room:
            with rust_errors(self._failed):
                cut = self._tokenizer.decode(encoding.ids[room:], skip_special_tokens=False)
            # Tokenizers that mark the ends of words may have no decoder that turns the marks into spaces.
            cut = cut.replace(getattr(self._tokenizer.model, "end_of_word_suffix", None) or " ", " ").strip()
            log.warning(
                "%s has room for %d tokens; the end of this prompt is left out: %r", stage, length, cut
            )
            encoding.truncate(room)
        with rust_errors(self._failed):
            ids = list(self._tokenizer.post_process(encoding).ids)
        if len(ids) > length:
            raise BundleError(
                f"{self._path} makes {len(ids)} tokens of {room}, where {length} have room",
                hint="rebuild the bundle",
            )
        return ids

    def _check_known(self, ids: Sequence[int], spec: TextSpec) -> None:
        """Refuse ids without a row in the encoder's embedding. ONNX Runtime's own error names only an index."""
        unknown = [token for token in ids if spec.vocab_size is not None and token >= spec.vocab_size]
        if unknown:
            raise UsageError(
                f"this text has the token {self._tokenizer.id_to_token(unknown[0])!r} with the id {unknown[0]}, but "
                f"the embedding of {spec.stage} has only {spec.vocab_size} rows",
                hint="leave this token out of the text, or build with the tokenizer that the text encoder was "
                "published with",
            )

    @staticmethod
    def select(
        states: Mapping[str, Array], mask: NDArray[np.int64], spec: TextSpec, *, negative: bool = False
    ) -> tuple[dict[str, Array], NDArray[np.int64]]:
        """The states and the mask (B,S) at the positions that reach the conditioner.

        Args:
            states: the encoder's named outputs. Those without a token axis, (B,D), stay as they are.
        """
        select = spec.negative_select if negative else spec.select
        if select is None:
            return dict(states), mask
        return {name: select(t) if t.ndim > 2 else t for name, t in states.items()}, select(mask)


def _prepared(text: str, spec: TextSpec, negative: bool) -> str:
    if not isinstance(text, str):
        raise UsageError(f"a prompt is {text!r:.60}, which is not text", hint="pass a str or a list of str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt {text!r:.60} is not valid Unicode: {error.reason} at position {error.start}",
            hint="it was probably cut inside a character: decode its bytes as UTF-8",
        ) from error
    text = text if negative or spec.suffix is None else text + spec.suffix
    text = text.lower() if spec.lower else text
    return text.strip() if spec.strip else text
