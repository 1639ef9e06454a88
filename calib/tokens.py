"""How a checkpoint's tokenizers see calibration prompts: words that a vocabulary does not know become small pieces."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from ditc.export.checkpoint.tokenizer import read_tokenizer
from ditc.export.quant.ranges import Prompt
from ditc.parity.reference.pytorch import TorchModel


class PromptTokens:
    """The tokenizers of a checkpoint's text encoders."""

    def __init__(self, reference: TorchModel) -> None:
        self._tokenizers: list[tuple[Tokenizer, bool, str | None]] = []
        for spec in reference.plan.text:
            tokenizer = read_tokenizer(reference.checkpoint, Path(spec.tokenizer).parent.name)
            unknown = _unknown(json.loads(tokenizer.json)["model"])
            self._tokenizers.append((tokenizer.rust, spec.lower, unknown))

    def of(self, prompt: str, digest: str) -> Prompt:
        """What is recorded of a prompt with this digest. Neither special tokens nor an instruction before it count."""
        ids, size_bytes, tokens = hashlib.sha256(), 0, 0
        for tokenizer, lower, unknown in self._tokenizers:
            text = prompt.lower() if lower else prompt
            encoding = tokenizer.encode(text, add_special_tokens=False)
            ids.update(json.dumps(encoding.ids).encode())
            size_bytes += len(text.encode())
            tokens += count_tokens(encoding, text, unknown)
        return Prompt(text=digest, ids=ids.hexdigest()[:16], size_bytes=size_bytes, tokens=tokens)


def _unknown(model: dict[str, object]) -> str | None:
    """The token for text that is not in the vocabulary. Unigram models name it by its id."""
    if model.get("type") == "Unigram":
        vocab, index = model["vocab"], model.get("unk_id")
        return str(vocab[index][0]) if isinstance(vocab, list) and isinstance(index, int) else None
    token = model.get("unk_token")
    return str(token) if token else None


def count_tokens(encoding: Encoding, text: str, unknown: str | None) -> int:
    """Number of the text's tokens. The unknown token counts as many as the bytes that it stands for."""
    spans = zip(encoding.tokens, encoding.offsets, strict=True)
    return sum(
        max(1, len(text[start:stop].encode())) if token == unknown else 1 for token, (start, stop) in spans
    )
