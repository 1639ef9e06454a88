"""Prompt handling, compared with transformers' tokenizers and diffusers' SanaPipeline."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from diffusers import SanaPipeline
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerFast

from ditc.runtime.bundle.jsondata import from_json, to_json
from ditc.runtime.errors import BundleError, UsageError
from ditc.runtime.text import LENGTH_STEP, PaddingSide, Select, TextSpec, Tokenizer, without_padding

INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
MAX_LENGTH = 300
DEMO = Path(__file__).parents[2] / "demo/checkpoint/tokenizer"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
PROMPTS = {
    "empty": "",
    "blank": "  \n\t ",
    "plain": 'A cyberpunk cat with a neon sign that says "Sana"',
    "capitals and spaces": "   A RED  Cube \n on a Table.  ",
    "emoji": "🐱‍👤 a cat, 👩🏽‍🚀 an astronaut 🇩🇪",
    "chinese": "一只戴着帽子的猫，水彩画",
    "accents": "ÉLAN – İstanbul straße Ǆ ﬁn naïve Ωmega",
    "controls": "a\x00b\u200d\u202ec\ufeff",
    "special tokens": "<bos> a cat <eos><pad>",
    "repeated": "cat " * 300,
    "very long": " ".join(str(number) for number in range(2000)) + " zebra",
}


def train_bpe() -> tokenizers.Tokenizer:
    """A small BPE tokenizer like Gemma's: spaces become ▁, and unknown characters become their bytes."""
    model = tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator([*INSTRUCTION, PROMPTS["plain"], PROMPTS["chinese"]], trainer)
    return tokenizer


def gemma_like() -> Any:
    trained = train_bpe()
    trained.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<bos>", pad_token="<pad>")


def with_end_token() -> Any:
    """A tokenizer like CLIP's and T5's: the last special token stays when a text is cut."""
    trained = train_bpe()
    special = [("<bos>", 2), ("<eos>", 1)]
    trained.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<eos>", pad_token="<pad>")


def gemma() -> Any:
    tokens = [*SPECIAL, "<mask>", "a", "t", "c", "at", "cat", "▁"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocab, merges=[("a", "t"), ("c", "at")])


def demo() -> Any:
    if not DEMO.is_dir():
        pytest.skip("the demo checkpoint is not in this tree")
    return AutoTokenizer.from_pretrained(DEMO)


def ours(reference: Any, folder: Path) -> Tokenizer:
    """The runtime's tokenizer, from the file that transformers saves."""
    reference.save_pretrained(folder)
    return Tokenizer(folder / "tokenizer.json")


def sana_spec(reference: Any) -> TextSpec:
    prefix = "\n".join(INSTRUCTION)
    return TextSpec(
        stage="text_encoder",
        tokenizer="tokenizer/tokenizer.json",
        length=MAX_LENGTH,
        max_length=len(reference(prefix).input_ids) + MAX_LENGTH - 2,
        negative_max_length=MAX_LENGTH,
        pad_token_id=reference.pad_token_id,
        prefix=prefix,
        select=Select(first=1, last=MAX_LENGTH - 1),
        lower=True,
        strip=True,
        mask="text_mask",
    )


class Encoder(torch.nn.Module):
    """Replaces Gemma and shows which tokens reach it: each state is (token id, position)."""

    dtype = torch.float32

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return (torch.stack([input_ids, positions], dim=-1).float(),)


def encode_with_diffusers(tokenizer: Any, prompt: list[str], negative_prompt: list[str]) -> list[np.ndarray]:
    """(embeds, mask, negative embeds, negative mask), from SanaPipeline.encode_prompt itself."""
    pipe = SanaPipeline.__new__(SanaPipeline)
    pipe.tokenizer, pipe.text_encoder = tokenizer, Encoder()
    options = {"device": torch.device("cpu"), "complex_human_instruction": INSTRUCTION}
    tensors = pipe.encode_prompt(prompt, True, negative_prompt, **options)
    return [tensor.numpy() for tensor in tensors]


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("make", [gemma_like, gemma, demo], ids=["trained", "GemmaTokenizer", "demo"])
def test_prompts_reach_the_conditioner_as_in_sana_pipeline(
    make: Callable[[], Any], prompt: str, tmp_path: Path
) -> None:
    reference = make()
    tokenizer = ours(reference, tmp_path)
    spec = sana_spec(reference)
    texts, negatives = [prompt, "A second Prompt"], ["", prompt]
    expected = encode_with_diffusers(reference, texts, negatives)
    found = []
    for values, negative in ((texts, False), (negatives, True)):
        batch = tokenizer.encode(values, spec, negative=negative)
        tensors = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        states = Encoder()(*tensors)[0].numpy()
        selected, mask = tokenizer.select({"states": states}, batch.attention_mask, spec, negative=negative)
        found += [selected["states"], mask]
    for array, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_only_hidden_tokens_are_left_out(prompt: str, tmp_path: Path) -> None:
    reference = gemma_like()
    tokenizer = ours(reference, tmp_path)
    spec = replace(sana_spec(reference), mask="text_mask", padding=(("text_bias", -10000.0),))
    for values, negative in (([prompt, "A second Prompt"], False), (["", prompt], True)):
        batch = tokenizer.encode(values, spec, negative=negative)
        states = {"states": np.stack([batch.input_ids, batch.attention_mask], axis=2)}
        every, whole_mask = tokenizer.select(states, batch.attention_mask, spec, negative=negative)
        short, kept = without_padding(spec, batch, negative=negative)
        states = {"states": np.stack([kept.input_ids, kept.attention_mask], axis=2)}
        found, mask = tokenizer.select(states, kept.attention_mask, short, negative=negative)
        tokens = mask.shape[1]
        assert tokens == short.length
        assert tokens == MAX_LENGTH or tokens % LENGTH_STEP == 0
        assert whole_mask[:, max(0, tokens - LENGTH_STEP) :].any(), "no step is for nothing"
        assert not whole_mask[:, tokens:].any()
        np.testing.assert_array_equal(mask, whole_mask[:, :tokens])
        np.testing.assert_array_equal(found["states"], every["states"][:, :tokens])
        assert not batch.attention_mask[:, kept.attention_mask.shape[1] :].any()


def test_padding_that_has_an_effect_stays(tmp_path: Path) -> None:
    reference = gemma_like()
    tokenizer = ours(reference, tmp_path)
    for changes in ({"padding": None}, {"mask": None}, {"padding_side": PaddingSide.LEFT}):
        spec = replace(
            sana_spec(reference), **{"mask": "text_mask", "padding": (("text_bias", 0.0),), **changes}
        )
        batch = tokenizer.encode(["cat"], spec)
        assert without_padding(spec, batch, negative=False) == (spec, batch)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_a_cut_keeps_the_end_token_as_transformers_does(prompt: str, side: str, tmp_path: Path) -> None:
    reference = with_end_token()
    reference.padding_side = side
    expected = reference([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="np")
    spec = TextSpec(
        stage="text_encoder",
        tokenizer="tokenizer.json",
        length=77,
        max_length=77,
        negative_max_length=77,
        pad_token_id=reference.pad_token_id,
        padding_side=PaddingSide(side),
    )
    # Saved after the call, so that the file holds transformers' truncation and padding, which must be ignored.
    path = tmp_path / "tokenizer.json"
    reference.backend_tokenizer.enable_truncation(5)
    reference.backend_tokenizer.enable_padding(length=9, pad_id=3)
    reference.backend_tokenizer.save(str(path))
    batch = Tokenizer(path).encode([prompt], spec)
    np.testing.assert_array_equal(batch.input_ids, expected.input_ids)
    np.testing.assert_array_equal(batch.attention_mask, expected.attention_mask)


def test_a_cut_is_logged_with_the_words_that_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = gemma_like()
    tokenizer, spec = ours(reference, tmp_path), sana_spec(reference)
    with caplog.at_level(logging.WARNING, logger="ditc"):
        tokenizer.encode(["a cat"], spec)
        assert not caplog.records
        tokenizer.encode([PROMPTS["very long"]], spec)
    (record,) = caplog.records
    assert record.getMessage().endswith("1999 zebra'")


def test_states_without_a_token_axis_are_not_selected() -> None:
    spec = sana_spec(gemma_like())
    states = {"pooled": np.zeros((1, 8)), "states": np.zeros((1, spec.max_length, 4))}
    selected, mask = Tokenizer.select(states, np.ones((1, spec.max_length), np.int64), spec)
    assert selected["pooled"].shape == (1, 8)
    assert selected["states"].shape == (1, MAX_LENGTH, 4)
    assert mask.shape == (1, MAX_LENGTH)


def test_a_token_without_a_row_in_the_embedding_is_named_with_its_id(tmp_path: Path) -> None:
    reference = gemma()
    tokenizer, spec = ours(reference, tmp_path), sana_spec(reference)
    known = replace(spec, vocab_size=int(tokenizer.encode(["a cat"], spec).input_ids.max()) + 1)
    tokenizer.encode(["a cat"], known)
    unknown = replace(spec, vocab_size=known.vocab_size - 1)
    with pytest.raises(
        UsageError, match=r"the token '.*' with the id \d+, but the embedding of \w+ has only"
    ) as caught:
        tokenizer.encode(["a cat"], unknown)
    assert "leave this token out" in str(caught.value.hint)


def test_threads_that_share_a_tokenizer_get_what_each_gets_alone(tmp_path: Path) -> None:
    reference = gemma_like()
    tokenizer, spec = ours(reference, tmp_path), sana_spec(reference)
    shorter = replace(spec, negative_max_length=20, length=20, select=Select(1, 19))
    text = [PROMPTS["very long"]]
    alone = {s.length: tokenizer.encode(text, s, negative=True).input_ids for s in (spec, shorter)}
    wrong: list[int] = []

    def work(mine: TextSpec) -> None:
        for _ in range(10):
            found = tokenizer.encode(text, mine, negative=True).input_ids
            if not np.array_equal(found, alone[mine.length]):
                wrong.append(mine.length)

    threads = [threading.Thread(target=work, args=(s,)) for s in (spec, shorter) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_spec_survives_the_manifest() -> None:
    spec = sana_spec(gemma_like())
    assert from_json(TextSpec, to_json(spec)) == spec


def test_a_spec_whose_lengths_do_not_fit_is_refused() -> None:
    spec = sana_spec(gemma_like())
    for change in ({"length": 299}, {"max_length": 200}, {"negative_max_length": 77}, {"select": None}):
        with pytest.raises(ValueError, match="selected"):
            replace(spec, **change)


@pytest.mark.parametrize("prompt", ["\ud83d broken", 7, None])
def test_a_prompt_that_is_not_text_is_refused(prompt: Any, tmp_path: Path) -> None:
    reference = gemma_like()
    with pytest.raises(UsageError, match="prompt"):
        ours(reference, tmp_path).encode([prompt], sana_spec(reference))


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": 3}', "PK\x03\x04"])
def test_a_file_that_is_not_a_tokenizer_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Tokenizer(path)
