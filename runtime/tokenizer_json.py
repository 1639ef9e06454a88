"""Opens a tokenizer.json, whose author may be anybody, and turns the errors of the Rust code that runs it into ours.

A tokenizer is a small program: normalizers rewrite the text, pre-tokenizers split it, a template puts tokens around it.
Forty normalizers that each double the text would fill any memory, and Rust ends the whole process where an allocation
fails. So the file is read here first, and what lengthens a text or takes quadratic time is bounded. Loading is part of
it, because the added tokens are normalized then. Regular expressions need no bound here: Oniguruma gives a match up
after 10 million steps.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from ditc.runtime.errors import BundleError, DitcError

# A vocabulary of 256,000 tokens takes tens of megabytes.
LARGEST_FILE = 128 * 2**20
# Of one text with the instruction before it, in bytes: about forty pages. Instructions have about 1 kB, and encoders
# read 77 to 512 tokens.
LONGEST_TEXT = 2**16
# Normalizers, pre-tokenizers, decoders or post-processors in a row, and pieces of a template. Published tokenizers have
# up to 5.
MOST_PARTS = 32
# By which factor all normalizers and pre-tokenizers together can lengthen a text. With SentencePiece's
# NFKC, this number is 528.
LARGEST_GROWTH = 1024
# By which factor all decoders can. They write the end of a prompt that has no room into a warning.
LARGEST_DECODING = 16
# Tokens around every text.
MOST_SPECIAL_TOKENS = 32
# In bytes. Of Unigram's tokens, of which every length is looked up at each byte of a text, and of texts that any model
# puts into a token for each unknown character. SentencePiece's have at most 16 characters by default.
LONGEST_TOKEN = 256
# Of WordPiece's words, which take quadratic time. BERT: 100.
LONGEST_WORD = 1000
# By which factor one part can lengthen a text in UTF-8; those that are not listed do not lengthen it. Unicode's FAQ
# gives 3 for NFC and NFD and 11 for NFKC and NFKD. A ByteLevel writes one byte in two, a Metaspace one space in four.
GROWTH = {
    **{"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 11},
    **{"ByteLevel": 2, "Metaspace": 4, "WordPiece": 2, "CTC": 2, "BPEDecoder": 2},
}
# The lists in which parts are nested.
LISTS = ("normalizers", "pretokenizers", "decoders", "processors")


class Unbounded(ValueError):
    """A tokenizer's file asks for more than any known tokenizer needs."""


def open_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Open a bundle's tokenizer.json.

    Raises:
        BundleError: the file is missing, is not a tokenizer, or asks for more than any known tokenizer needs.
    """

    def refused(error: BaseException) -> DitcError:
        return BundleError(f"{path} is not a tokenizer: {error}", hint="rebuild the bundle")

    with rust_errors(refused):
        text = read_bounded(path)
        tokenizer = tokenizers.Tokenizer.from_str(text)
        check_special_tokens(tokenizer)
        return tokenizer


def read_bounded(path: Path) -> str:
    """The content of a tokenizer.json, if it is bounded.

    Raises:
        Unbounded: it asks for more than any known tokenizer needs.
        OSError, ValueError: it cannot be read, or is not JSON.
    """
    if path.stat().st_size > LARGEST_FILE:
        raise Unbounded(f"it has {path.stat().st_size} bytes, and {LARGEST_FILE} are the most")
    text = path.read_text(encoding="utf-8")
    try:
        check_bounded(json.loads(text))
    except RecursionError as e:
        raise Unbounded("it is nested too deeply") from e
    return text


def check_bounded(content: Any) -> None:
    """Refuse a tokenizer.json, as json.loads gives it, that could fill the memory or take hours.

    Raises:
        Unbounded: the message names the part and the bound.
    """
    if not isinstance(content, dict):
        raise Unbounded(f"it holds a JSON {type(content).__name__}, not an object")
    before, decoding = 1.0, 1.0
    for section in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        parts = list(_parts(content.get(section)))
        _at_most(len(parts), MOST_PARTS, f"its {section} has {{}} parts")
        growth = math.prod(map(_growth, parts))
        if section == "decoder":
            decoding = growth
        elif section == "post_processor":
            for part in parts:
                _check_template(part.get("single"))
        else:
            before *= growth
    _at_most(before, LARGEST_GROWTH, "its normalizer and pre_tokenizer make a text up to {} times as long")
    _at_most(decoding, LARGEST_DECODING, "its decoder makes a text up to {} times as long")
    added = sum(map(_content_bytes, _list(content.get("added_tokens"))))
    _at_most(
        added * before,
        LONGEST_TEXT * LARGEST_GROWTH,
        "its added tokens can have {} bytes once they are normalized",
    )
    _check_model(content.get("model"))


def check_special_tokens(tokenizer: tokenizers.Tokenizer) -> None:
    """Refuse a template with many tokens around every text. Raises Unbounded."""
    _at_most(
        tokenizer.num_special_tokens_to_add(is_pair=False),
        MOST_SPECIAL_TOKENS,
        "it puts {} tokens around every text",
    )


def encode(tokenizer: tokenizers.Tokenizer, text: str, *, special_tokens: bool = True) -> tokenizers.Encoding:
    """The tokens of a text.

    Raises:
        Unbounded: the text is too long, as it is or once normalized.
    """
    _at_most(len(text.encode()), LONGEST_TEXT, "the text has {} bytes, with the instruction before it")
    if tokenizer.normalizer is not None:
        # The product of what the parts can do is far above what they do to a text.
        longer = len(tokenizer.normalizer.normalize_str(text).encode())
        _at_most(longer, 4 * LONGEST_TEXT, "the text has {} bytes once it is normalized")
    return tokenizer.encode(text, add_special_tokens=special_tokens)


@contextmanager
def rust_errors(as_error: Callable[[BaseException], DitcError]) -> Iterator[None]:
    """Turn what `tokenizers` raises into an error of ours.

    It raises bare Exceptions for malformed files (0.23), and its panics are BaseExceptions that have no public class.
    """
    try:
        yield
    except DitcError:
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise as_error(e) from e


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """All parts of one section, with those that are nested in sequences."""
    if not isinstance(value, dict):
        return
    nested = [name for name in LISTS if name in value]
    if not nested:
        yield value
    for name in nested:
        for part in _list(value[name]):
            yield from _parts(part)


def _growth(part: dict[str, Any]) -> float:
    """By which factor one part can lengthen a text, in bytes.

    It is recognised by its fields, because tokenizers (0.23) also reads parts without a type.
    """
    if "precompiled_charsmap" in part:
        return _longest_replacement(part["precompiled_charsmap"])
    if "prepend" in part:
        return 1.0 + _length(part["prepend"])
    if "content" in part and "pattern" in part:
        pattern = part["pattern"]
        found = _length(pattern.get("String")) if isinstance(pattern, dict) else _length(pattern)
        # A regular expression, or an empty text, may match between any two bytes.
        return max(1.0, _length(part["content"]) / found) if found else 1.0 + _length(part["content"])
    kind = part.get("type")
    return float(GROWTH.get(kind, 1)) if isinstance(kind, str) else 1.0


def _longest_replacement(charsmap: Any) -> float:
    """Of SentencePiece's table: the size of a trie in bytes, the trie, and replacements that end with a zero byte."""
    try:
        table = base64.b64decode(charsmap)
    except (TypeError, ValueError, binascii.Error):
        return 1.0  # the parser refuses it
    trie = int.from_bytes(table[:4], "little")
    if trie > len(table) - 4:
        raise Unbounded(f"its precompiled_charsmap has {len(table)} bytes and a trie of {trie}")
    return float(max(1, *map(len, table[4 + trie :].split(b"\0"))))


def _check_template(pieces: Any) -> None:
    pieces = _list(pieces)
    _at_most(len(pieces), MOST_PARTS, "its template has {} pieces")
    texts = sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces)
    _at_most(texts, 1, "its template holds the text {} times")


def _check_model(model: Any) -> None:
    if not isinstance(model, dict):
        return
    if model.get("dropout"):
        raise Unbounded(f"its dropout is {model['dropout']!r:.80}: a text would get other tokens every time")
    word = model.get("max_input_chars_per_word", 0)
    _at_most(word if isinstance(word, int | float) else 0, LONGEST_WORD, "its words may have {} characters")
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        _at_most(_length(model.get(name)), LONGEST_TOKEN, f"its {name} has {{}} bytes")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram's: pairs of a token and its score
        longest = max((_length(pair[0]) for pair in vocabulary if isinstance(pair, list) and pair), default=0)
        _at_most(longest, LONGEST_TOKEN, "its longest token has {} bytes")


def _at_most(value: float, most: float, what: str) -> None:
    if not value <= most:
        raise Unbounded(f"{what.format(f'{value:.10g}')}, and {most} is the most that is served")


def _content_bytes(token: Any) -> int:
    return _length(token.get("content")) if isinstance(token, dict) else 0


def _length(text: Any) -> int:
    return len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
