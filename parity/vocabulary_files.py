"""What the other files of a tokenizer's folder say about splitting texts, read without transformers.

CLIP has vocab.json and merges.txt, T5 and Gemma have SentencePiece's files. transformers does not read them beside a
tokenizer.json.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ditc.export.checkpoint.vocabulary import SENTENCEPIECE_FILES

# sentencepiece_model.proto: ModelProto.pieces is field 1; a piece has text, score and type.
PIECES, TEXT, SCORE, TYPE = 1, 1, 2, 3
NORMAL, USER_DEFINED = 1, 4
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
ROUNDING = 1e-4  # of a score, which is a float32 below 100


def disagreements(directory: Path, model: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """For every such file of the folder: its name, and what it says otherwise than the tokenizer does.

    Args:
        model: what the tokenizer does, as tokenizer.json writes it.
    """
    vocabulary = model["vocab"]
    scores: dict[str, float] = {}
    if isinstance(vocabulary, list):  # Unigram's: [token, score] in the order of ids
        scores = dict(vocabulary)
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    for name in SENTENCEPIECE_FILES:
        if (directory / name).is_file():
            pieces = read_pieces((directory / name).read_bytes())
            yield (
                name,
                [
                    repr(token)
                    for token, (i, score) in pieces.items()
                    if vocabulary.get(token) != i or abs(scores.get(token, score) - score) > ROUNDING
                ],
            )
    if (directory / "vocab.json").is_file():
        wanted = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
        yield "vocab.json", [repr(token) for token, i in wanted.items() if vocabulary.get(token) != i]
    if (directory / "merges.txt").is_file():
        lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
        ours = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
        wrong = [repr(theirs) for theirs, our in zip(merges, ours, strict=False) if theirs != our]
        longer = max(merges, ours, key=len)[min(len(merges), len(ours)) :]
        yield "merges.txt", wrong + [repr(merge) for merge in longer]


def read_pieces(model: bytes) -> dict[str, tuple[int, float]]:
    """Piece -> id and score, of the pieces that stand for text.

    Control and unknown pieces are left out, because configs may rename them, and so are bytes: transformers renames
    Gemma's <0x09>.
    """
    pieces = [dict(_fields(bytes(value))) for field, value in _fields(model) if field == PIECES]
    return {
        bytes(piece[TEXT]).decode(): (i, struct.unpack("<f", bytes(piece.get(SCORE, bytes(4))))[0])
        for i, piece in enumerate(pieces)
        if piece.get(TYPE, NORMAL) in (NORMAL, USER_DEFINED)
    }


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: number and value."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(key & 7, 0)
        if key & 7 == BYTES:
            size, at = _varint(message, at)
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
