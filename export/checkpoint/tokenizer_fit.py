"""Whether a tokenizer and a text encoder belong together: vocabulary, embedding and special tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ditc.export.checkpoint.open import Component
from ditc.export.checkpoint.tokenizer import CheckpointTokenizer
from ditc.runtime.errors import CheckpointError

log = logging.getLogger(__name__)

# Short texts that differ in their first letters, so that a tokenizer of any language and any length tells them apart.
PROBES = ("red", "blue", "a cat", "two dogs")
OWN_TOKENIZER = "use the tokenizer that the text encoder was published with"


def unused_rows(rows: int) -> int:
    """How many rows of an embedding may have no token: embeddings are padded to a round size.

    Of T5's 32128 rows, 28 have no token; Gemma and CLIP use all. A sixteenth is far above any such padding and far
    below the difference between two vocabularies. Small embeddings may be half empty: 512 rows cost nothing.
    """
    return max(512, rows // 16)


def check_fits(tokenizer: CheckpointTokenizer, encoder: Component, *, legacy_ids: bool = False) -> int:
    """Refuse a tokenizer of another text encoder, or one that is not usable. Returns the embedding's number of rows.

    Args:
        legacy_ids: whether the ids of special tokens that the encoder's config states are known to be wrong.

    Raises:
        CheckpointError: the error names both components and the numbers that do not fit.
    """
    rows = encoder.config.get("vocab_size")
    if type(rows) is not int:
        raise CheckpointError(
            f"{encoder.name}/config.json has vocab_size {rows!r}, not a number of tokens",
            hint="set it to the number of rows of the text encoder's embedding",
        )
    _check_size(tokenizer, encoder.name, rows)
    name = tokenizer.directory.name
    ids = {text: tokenizer.ids(text) for text in PROBES}
    if len(set(map(tuple, ids.values()))) < len(PROBES):
        raise CheckpointError(
            f"{name} gives different texts the same tokens: "
            + ", ".join(f"{t!r} {i}" for t, i in ids.items()),
            hint=f"its vocabulary is empty or damaged: {OWN_TOKENIZER}",
        )
    around = tokenizer.ids("")
    for role in ("bos", "eos"):
        wanted, found = ids_of(encoder.config, role), tokenizer.special_ids.get(role)
        if not legacy_ids and found in around and wanted and found not in wanted:
            raise CheckpointError(
                f"{name} puts the {role} token {found} around every text, but {encoder.name}/config.json has "
                f"{role}_token_id {encoder.config[f'{role}_token_id']}",
                hint=f"the two belong to different models: {OWN_TOKENIZER}",
            )
    return rows


def ids_of(config: Mapping[str, Any], role: str) -> tuple[int, ...]:
    """The ids that a config states for a role: one, a list of them, or none."""
    value = config.get(f"{role}_token_id")
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _check_size(tokenizer: CheckpointTokenizer, encoder: str, rows: int) -> None:
    name = tokenizer.directory.name
    largest = max(tokenizer.vocabulary.values(), default=-1)
    if largest >= rows:
        raise CheckpointError(
            f"{name} has tokens up to {largest}, but the embedding of {encoder} has only {rows} rows",
            hint=f"the two belong to different models: {OWN_TOKENIZER}",
        )
    for role, token in tokenizer.special_ids.items():
        if token >= rows:
            raise CheckpointError(
                f"the {role} token of {name} has the id {token}, but the embedding of {encoder} has only {rows} rows",
                hint=f"the token was added without resizing the text encoder: {OWN_TOKENIZER}",
            )
    if largest + 1 < rows - unused_rows(rows):
        raise CheckpointError(
            f"{name} has only {largest + 1} tokens for the {rows} rows of the embedding of {encoder}",
            hint=f"its vocabulary is incomplete, or belongs to another model: {OWN_TOKENIZER}",
        )
    outside = [token for token, i in tokenizer.added.items() if i >= rows]
    if outside:
        log.warning(
            "%s adds %s, for which the embedding of %s has no row: prompts with them will be refused",
            *(name, ", ".join(map(repr, outside[:5])) + (", ..." if len(outside) > 5 else ""), encoder),
        )
