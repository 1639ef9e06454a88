"""Tokenizers of a checkpoint: loaded as diffusers does, and refused where they do not fit the text encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted import context_of, torch_candidate
from tokenizers import Tokenizer as RustTokenizer
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from ditc.export.checkpoint import vocabulary
from ditc.export.checkpoint.open import Component, open_checkpoint
from ditc.export.checkpoint.tensors import TensorSource
from ditc.export.checkpoint.tokenizer import CheckpointTokenizer, read_tokenizer
from ditc.export.checkpoint.tokenizer_fit import check_fits
from ditc.export.contract import BuildOptions, ModelPlan
from ditc.export.families import find_adapter
from ditc.parity.levels import LEVELS
from ditc.runtime.errors import CheckpointError
from ditc.runtime.text import PaddingSide
from ditc.runtime.tolerances import Level, Metric

TINY = ["tiny_checkpoint", "mmdit_checkpoint"]
SD3 = "sd3_checkpoint"


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """A function that copies the checkpoint of a fixture. Weights are links, for a plan reads only their headers."""

    def make(fixture: str) -> Path:
        def link(source: str, target: str) -> None:
            Path(target).hardlink_to(source) if source.endswith(".safetensors") else shutil.copy(
                source, target
            )

        source = request.getfixturevalue(fixture)
        return Path(shutil.copytree(source, tmp_path / fixture, copy_function=link))

    return make


def plan(checkpoint: Path) -> ModelPlan:
    opened = open_checkpoint(checkpoint)
    return find_adapter(opened).plan(opened, BuildOptions())


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("fixture", "name", "files"),
    [
        *((fixture, "tokenizer", "tokenizer.json, or tokenizer.model") for fixture in TINY),
        (SD3, "tokenizer", "tokenizer.json, or merges.txt with vocab.json"),
        (SD3, "tokenizer_2", "tokenizer.json, or merges.txt with vocab.json"),
        (SD3, "tokenizer_3", "tokenizer.json, or spiece.model, or tokenizer.model"),
    ],
)
def test_a_tokenizer_without_a_vocabulary_is_refused_with_the_names_of_its_files(
    copy, fixture: str, name: str, files: str
) -> None:
    checkpoint = copy(fixture)
    (checkpoint / name / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=rf"component '{name}' has no vocabulary: .*{files}$"):
        plan(checkpoint)


def test_vocab_and_merges_take_the_place_of_tokenizer_json(copy) -> None:
    checkpoint = copy(SD3)
    data = json.loads((checkpoint / "tokenizer" / "tokenizer.json").read_text())
    before = plan(checkpoint).text
    (checkpoint / "tokenizer" / "tokenizer.json").unlink()
    (checkpoint / "tokenizer" / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
    merges = [" ".join(pair) for pair in data["model"]["merges"]]
    (checkpoint / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    assert plan(checkpoint).text == before
    assert (
        ids(checkpoint, "tokenizer")
        == CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")("a red cat").input_ids
    )


def test_a_sentencepiece_file_alone_needs_its_packages(copy, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = copy(SD3)
    (checkpoint / "tokenizer_3" / "tokenizer.json").rename(checkpoint / "tokenizer_3" / "spiece.model")
    monkeypatch.setattr(vocabulary, "_installed", lambda module: module != "sentencepiece")
    with pytest.raises(CheckpointError, match="cannot be read without sentencepiece") as caught:
        plan(checkpoint)
    assert caught.value.hint == "pip install sentencepiece"


@pytest.mark.parametrize("fixture", ["tiny_checkpoint", "mmdit_checkpoint"])
def test_the_class_in_model_index_counts_as_in_diffusers(copy, fixture: str) -> None:
    checkpoint = copy(fixture)
    as_gemma = ids(checkpoint, "tokenizer")
    index = checkpoint / "model_index.json"
    change(index, lambda data: data.update(tokenizer=["transformers", "PreTrainedTokenizerFast"]))
    theirs = PreTrainedTokenizerFast.from_pretrained(checkpoint / "tokenizer")("a red cat").input_ids
    assert ids(checkpoint, "tokenizer") == theirs != as_gemma


def test_a_picture_with_the_class_in_model_index_is_that_of_diffusers(copy) -> None:
    checkpoint = copy("tiny_checkpoint")
    _index(["transformers", "PreTrainedTokenizerFast"])(checkpoint)
    context = context_of(checkpoint, torch_candidate(checkpoint), with_upstream=True)
    (psnr,) = (r for r in LEVELS[Level.PICTURE](context) if r.metric is Metric.PSNR)
    assert psnr.against == "diffusers" and psnr.value > 100


def test_a_t5_without_a_class_in_its_own_config_is_read_by_model_index(copy) -> None:
    checkpoint = copy(SD3)
    change(checkpoint / "tokenizer_3" / "tokenizer_config.json", lambda data: data.pop("tokenizer_class"))
    assert (
        ids(checkpoint, "tokenizer_3")
        == T5Tokenizer.from_pretrained(checkpoint / "tokenizer_3")("a red cat").input_ids
    )


def test_padding_is_put_on_the_side_that_the_tokenizer_says(copy) -> None:
    checkpoint = copy(SD3)
    change(
        checkpoint / "tokenizer_3" / "tokenizer_config.json", lambda data: data.update(padding_side="left")
    )
    assert [text.padding_side for text in plan(checkpoint).text] == ["right", "right", "left"]


def _embedding(name: str, **values: object) -> Callable[[Path], None]:
    return lambda path: change(path / name / "config.json", lambda data: data.update(values))


def _settings(name: str, **values: object) -> Callable[[Path], None]:
    return lambda path: change(path / name / "tokenizer_config.json", lambda data: data.update(values))


def _no_words(path: Path) -> None:
    def empty(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        data["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < 4}

    change(path / "tokenizer" / "tokenizer.json", empty)


def _pad_without_a_row(path: Path) -> None:
    _settings("tokenizer", pad_token="[PAD]")(path)
    _embedding("text_encoder", vocab_size=261)(path)


def _broken(name: str) -> Callable[[Path], object]:
    return lambda path: (path / "tokenizer" / name).write_text("[1, 2")


def _index(value: object) -> Callable[[Path], None]:
    return lambda path: change(path / "model_index.json", lambda data: data.update(tokenizer=value))


def _swapped(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(path / "tokenizer_3" / name, path / "tokenizer_2" / name)
    change(path / "model_index.json", lambda data: data.update(tokenizer_2=data["tokenizer_3"]))


@pytest.mark.parametrize(
    ("fixture", "damage", "message"),
    [
        ("tiny_checkpoint", _no_words, "tokenizer gives different texts the same tokens"),
        ("mmdit_checkpoint", _no_words, "tokenizer gives different texts the same tokens"),
        (
            "tiny_checkpoint",
            _embedding("text_encoder", vocab_size=100),
            "tokens up to 260.*text_encoder.*100 rows",
        ),
        (
            "tiny_checkpoint",
            _embedding("text_encoder", vocab_size=32128),
            "only 261 tokens for the 32128 rows",
        ),
        (
            "tiny_checkpoint",
            _embedding("text_encoder", bos_token_id=7),
            "bos token 2 around every text.*bos_token_id 7",
        ),
        (
            "mmdit_checkpoint",
            _pad_without_a_row,
            "the pad token of tokenizer has the id 262, but the embedding of text_encoder has only 261 rows",
        ),
        ("tiny_checkpoint", _settings("tokenizer", truncation_side="left"), "truncation_side 'left'"),
        ("tiny_checkpoint", _settings("tokenizer", model_max_length="long"), "model_max_length 'long'"),
        ("tiny_checkpoint", _settings("tokenizer", padding_side="up"), "can load as a GemmaTokenizer"),
        ("tiny_checkpoint", _broken("tokenizer.json"), "can load as a GemmaTokenizer"),
        ("tiny_checkpoint", _broken("tokenizer_config.json"), "tokenizer_config.json is not JSON"),
        (
            "tiny_checkpoint",
            _index(["transformers", "NoTokenizer"]),
            "transformers.NoTokenizer for tokenizer",
        ),
        (SD3, _embedding("text_encoder_2", vocab_size=400), "tokenizer_2 has tokens up to 517"),
        (SD3, _embedding("text_encoder", eos_token_id=3), "eos token 517 around every text"),
        (SD3, _embedding("text_encoder_3", vocab_size=30), "tokenizer_3 has tokens up to 35"),
        (SD3, _swapped, "eos token 1 around every text, but text_encoder_2"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused_by_name(copy, fixture: str, damage, message: str) -> None:
    checkpoint = copy(fixture)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        plan(checkpoint)
    assert caught.value.hint


# Sana's Gemma-2, SD3's CLIPs (with the special ids that transformers saved before 4.31) and T5.
@pytest.mark.parametrize(
    ("tokens", "special", "config"),
    [
        (256_000, {"bos": 2, "eos": 1, "pad": 0, "unk": 3}, {"vocab_size": 256_000, "bos_token_id": 2}),
        (
            49_408,
            {"bos": 49_406, "eos": 49_407, "pad": 49_407},
            {"vocab_size": 49_408, "eos_token_id": 49_407},
        ),
        (32_100, {"eos": 1, "pad": 0, "unk": 2}, {"vocab_size": 32_128, "eos_token_id": [1]}),
    ],
)
def test_published_tokenizers_fit(tiny_checkpoint: Path, tokens: int, special, config) -> None:
    rust = RustTokenizer.from_file(str(tiny_checkpoint / "tokenizer" / "tokenizer.json"))
    tokenizer = CheckpointTokenizer(
        directory=Path("tokenizer"),
        rust=rust,
        vocabulary={str(i): i for i in range(tokens)},
        added={},
        special_ids=special,
        pad_token_id=0,
        padding_side=PaddingSide.RIGHT,
        model_max_length=77,
    )
    assert (
        check_fits(tokenizer, Component("text_encoder", config, TensorSource({}), ())) == config["vocab_size"]
    )


def test_clip_with_ids_from_before_transformers_4_31_fits_if_its_end_is_the_largest_id(copy) -> None:
    checkpoint = copy(SD3)
    _embedding("text_encoder", bos_token_id=0, eos_token_id=2, pad_token_id=1)(checkpoint)
    assert plan(checkpoint).text[0].vocab_size == 518


def ids(checkpoint: Path, name: str) -> list[int]:
    """The ids of a text, from the tokenizer that a bundle of the checkpoint would get."""
    return read_tokenizer(open_checkpoint(checkpoint), name).ids("a red cat")
