"""Vocabularies as files hold them, read without transformers: vocab.json with merges.txt, and SentencePiece models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ditc.export.checkpoint.vocabulary import SENTENCEPIECE_FILES

# sentencepiece_model.proto: ModelProto.pieces is field 1; a piece has its text in field 1 and its type in field 3.
PIECES, TEXT, TYPE = 1, 1, 3
NORMAL, USER_DEFINED = 1, 4
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def disagreements(directory: Path, vocabulary: Mapping[str, int]) -> Iterator[tuple[str, list[str]]]:
    """For every such file of the folder: its name, and its tokens that have another id in the vocabulary, or none."""
    for name in ("vocab.json", *SENTENCEPIECE_FILES):
        path = directory / name
        if path.is_file():
            wanted = (
                json.loads(path.read_text("utf-8"))
                if name == "vocab.json"
                else read_pieces(path.read_bytes())
            )
            yield name, [repr(token) for token, i in wanted.items() if vocabulary.get(token) != i]


def read_pieces(model: bytes) -> dict[str, int]:
    """Piece -> id, of the pieces that stand for text.

    Control and unknown pieces are left out, because configs may rename them, and so are bytes: transformers renames
    Gemma's <0x09>.
    """
    pieces = [dict(_fields(bytes(value))) for field, value in _fields(model) if field == PIECES]
    return {
        bytes(piece[TEXT]).decode(): i
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
