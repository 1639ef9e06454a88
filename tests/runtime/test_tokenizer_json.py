"""A bundle's tokenizer.json may be written by anybody: no file and no text fills the memory or ends the interpreter."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ditc.runtime.errors import BundleError, DitcError, UsageError
from ditc.runtime.text import TextSpec, Tokenizer
from ditc.runtime.tokenizer_json import LONGEST_TEXT, check_bounded

SPEC = TextSpec(
    stage="text_encoder",
    tokenizer="tokenizer.json",
    length=8,
    max_length=8,
    negative_max_length=8,
    pad_token_id=0,
)
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
PAIR = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
A_MILLION = {"<t>": {"id": "<t>", "ids": [0] * 10**6, "tokens": ["<t>"] * 10**6}}
ADDED = {
    "id": 9,
    "content": "a" * 10**6,
    "normalized": True,
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False),
}


def plain() -> dict[str, Any]:
    tokenizer = RustTokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def encode(path: Path, content: object, text: str) -> list[int]:
    (path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(path / "tokenizer.json")
    return [int(token) for token in tokenizer.encode([text], SPEC).input_ids[0]]


def charsmap(trie_bytes: int, replacement: bytes) -> str:
    return base64.b64encode(trie_bytes.to_bytes(4, "little") + bytes(8) + replacement).decode()


def sequence(kind: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", kind: parts}


def template(pieces: list[dict[str, Any]], special: dict[str, Any]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": pieces, "pair": PAIR, "special_tokens": special}


TOKEN, TEXT = {"SpecialToken": {"id": "<t>", "type_id": 0}}, PAIR[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": sequence("normalizers", [DOUBLE] * 30)}, "1073741824 times as long"),
        (
            {"normalizer": {"normalizers": [{k: DOUBLE[k] for k in ("pattern", "content")}] * 30}},
            "times as long",
        ),
        ({"normalizer": sequence("normalizers", [sequence("normalizers", [DOUBLE] * 6)] * 6)}, "36 parts"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}, "times as long"),
        ({"normalizer": {**DOUBLE, "pattern": {"Regex": ""}, "content": "x" * 2000}}, "times as long"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(2**32 - 1, b"")}}, "a trie"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(8, b"x" * 2000)}},
            "as long",
        ),
        ({"pre_tokenizer": sequence("pretokenizers", [{"type": "ByteLevel"}] * 30)}, "times as long"),
        ({"decoder": sequence("decoders", [DOUBLE] * 30)}, "its decoder makes a text"),
        ({"normalizer": sequence("normalizers", [DOUBLE] * 9), "added_tokens": [ADDED]}, "its added tokens"),
        ({"post_processor": template([TOKEN] * 10**5 + [TEXT], {})}, "100001 pieces"),
        ({"post_processor": template([TOKEN, TEXT], A_MILLION)}, "1000000 tokens around every text"),
        (
            {"post_processor": sequence("processors", [template([TEXT] * 2, {})] * 30)},
            "holds the text 2 times",
        ),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 3000, 0.0]]}}, "its longest token"),
        ({"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9}}, "words may have 1000000000"),
        ({"model": {"type": "BPE", "unk_token": "x" * 10**6}}, "its unk_token has"),
        ({"model": {"type": "BPE", "dropout": 0.5}}, "other tokens every time"),
    ],
)
def test_a_file_that_could_fill_the_memory_or_take_hours_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        encode(tmp_path, plain() | changes, "a")
    assert caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {**DOUBLE, "pattern": {"Regex": "(a+)+$"}}},  # more than 10 million steps
        {"decoder": {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(8, b"x")}},
    ],
)
def test_a_panic_of_rust_is_an_error_of_the_bundle(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"fails for this text|is not a tokenizer"):
        encode(tmp_path, plain() | changes, "a" * 40 + "b" + " a" * 20)


def test_a_text_that_is_too_long_is_refused_before_and_after_it_is_normalized(tmp_path: Path) -> None:
    assert len(encode(tmp_path, plain(), "a " * (LONGEST_TEXT // 2))) == SPEC.length
    longer = {**DOUBLE, "content": "a" * 100}
    for content, text in (
        (plain(), "a" * (LONGEST_TEXT + 1)),
        (plain() | {"normalizer": longer}, "a" * 10000),
    ):
        with pytest.raises(UsageError, match=r"and (65536|262144) is the most") as caught:
            encode(tmp_path, content, text)
        assert "shorten it" in str(caught.value.hint)


def test_text_without_room_beside_the_special_tokens_is_refused(tmp_path: Path) -> None:
    special = {"<t>": {"id": "<t>", "ids": [0] * 9, "tokens": ["<t>"] * 9}}
    with pytest.raises(UsageError, match="has room for 8 tokens, but every text gets 9 special ones"):
        encode(tmp_path, plain() | {"post_processor": template([TOKEN, TEXT], special)}, "a")


@pytest.mark.parametrize("content", [None, [], "text", {"normalizer": [[]], "model": [], "added_tokens": 3}])
def test_anything_but_a_tokenizer_is_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(DitcError, match="is not a tokenizer"):
        encode(tmp_path, content, "a")
    (tmp_path / "tokenizer.json").write_text('{"normalizer":' + "[" * 10**5 + "]" * 10**5 + "}")
    with pytest.raises(BundleError, match="nested too deeply"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_the_tokenizers_of_published_models_are_within_the_bounds() -> None:
    t5 = RustTokenizer(models.Unigram([("<unk>", 0.0), ("\u2581a", -1.0)], unk_id=0))
    t5.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    t5.decoder = decoders.Metaspace()
    replaced = normalizers.NFKC().normalize_str("\ufdfa").encode()  # the longest of all
    normalizer = [
        {"type": "Precompiled", "precompiled_charsmap": charsmap(8, replaced)},
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"},
    ]
    check_bounded(json.loads(t5.to_str()) | {"normalizer": sequence("normalizers", normalizer)})
    clip = RustTokenizer(models.BPE({"a": 0, "b": 1}, [], unk_token="a", end_of_word_suffix="</w>"))
    clip.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(r"\s+", " "), normalizers.Lowercase()]
    )
    clip.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("'s", "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    clip.post_processor = processors.RobertaProcessing(("b", 1), ("a", 0))
    clip.decoder = decoders.ByteLevel()
    check_bounded(json.loads(clip.to_str()))
