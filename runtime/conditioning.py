"""Texts to the rows that condition the denoiser: tokenize, encode, merge; once a text, then from the cache."""

# R rows (one a text here), S text tokens, D channels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ditc.runtime.cache import RowCache
from ditc.runtime.errors import NumericsError, UsageError
from ditc.runtime.session import Array, Session, to_numpy
from ditc.runtime.spec import CONDITIONER, StageSpec
from ditc.runtime.text import TextSpec, TokenBatch, Tokenizer

TEXT_EMBEDS = "text_embeds"
TEXT_MASK = "text_mask"


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One text encoder: its data, its tokenizer and its session."""

    spec: TextSpec
    tokenizer: Tokenizer
    session: Session


class Conditioning:
    """Rows of conditioning for texts or for ready-made embeddings.

    Texts run one at a time: a row then does not depend on what it was batched with, and a cached row is the
    same row. The cache is keyed by the artifacts and the token ids.
    """

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        conditioner: Session,
        *,
        key: str,
        cache: RowCache | None = None,
    ) -> None:
        self.encoders = tuple(encoders)
        self.conditioner = conditioner
        self.cache = cache if cache is not None else RowCache()
        self._key = key

    def of_text(self, text: str, *, negative: bool) -> Mapping[str, Array]:
        """Named tensors of one row (1, ...).

        Raises:
            NumericsError: an encoder left NaN or Inf.
        """
        tokens = [
            encoder.tokenizer.encode([text], encoder.spec, negative=negative) for encoder in self.encoders
        ]
        ids = tuple(batch.input_ids.tobytes() for batch in tokens)
        return self.cache.get((self._key, negative, ids), lambda: self._encode(tokens, negative))

    def of_embeds(self, embeds: Array, mask: Array) -> Mapping[str, Array]:
        """The row for one text that was encoded elsewhere: embeds (S,D) or (1,S,D), mask (S,) or (1,S)."""
        spec = self.conditioner.spec
        _, length, wanted = spec.input(TEXT_EMBEDS).shape
        assert isinstance(wanted, int)
        if isinstance(length, str) and mask.shape[-1] not in spec.profile[length]:
            raise UsageError(
                f"prompt_embeds have {mask.shape[-1]} tokens, this bundle takes {spec.profile[length].min} to "
                f"{spec.profile[length].max}",
                hint="cut them, or build with a longer max_sequence_length",
            )
        if embeds.shape[-1] != wanted:
            raise UsageError(
                f"prompt_embeds have {embeds.shape[-1]} channels, this model takes {wanted}",
                hint="pass the text encoder's last hidden states",
            )
        feeds: dict[str, Array] = {
            TEXT_EMBEDS: np.asarray(embeds, np.float32).reshape(1, -1, wanted),
            TEXT_MASK: np.asarray(mask, np.int64).reshape(1, -1),
        }
        return self._merge(feeds)

    def _encode(self, tokens: Sequence[TokenBatch], negative: bool) -> Mapping[str, Array]:
        named: dict[str, Array] = {}
        for encoder, batch in zip(self.encoders, tokens, strict=True):
            outputs = encoder.session.run(_token_feeds(encoder.session.spec, batch))
            host = {name: to_numpy(tensor) for name, tensor in outputs.items()}
            for name, tensor in host.items():
                if not np.isfinite(tensor).all():
                    raise NumericsError(
                        f"{encoder.spec.stage}: {name} has NaN or Inf for this text",
                        hint="text encoders of this kind overflow in fp16: build this stage in bf16 or fp32",
                    )
            selected, mask = encoder.tokenizer.select(
                host, batch.attention_mask, encoder.spec, negative=negative
            )
            named |= selected
            if encoder.spec.mask is not None:
                named[encoder.spec.mask] = mask
        return self._merge(named)

    def _merge(self, named: Mapping[str, Array]) -> Mapping[str, Array]:
        spec = self.conditioner.spec
        outputs = self.conditioner.run({tensor.name: named[tensor.name] for tensor in spec.inputs})
        row = {name: to_numpy(tensor) for name, tensor in outputs.items()}
        for name, tensor in row.items():
            if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
                raise NumericsError(f"{CONDITIONER}: {name} has NaN or Inf", hint="rebuild in bf16 or fp32")
        return row


def _token_feeds(spec: StageSpec, batch: TokenBatch) -> dict[str, Array]:
    feeds = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return {tensor.name: feeds[tensor.name] for tensor in spec.inputs}
