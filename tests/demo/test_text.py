"""The tokenizer that the recipe builds, and what the text encoder is taught with it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from demo.train.text import MAX_LENGTH, Student, build_model, build_tokenizer, distillation_loss, tokenize

_PHRASES = ["red heart", "blue heart", "a dog face in flat style", "fire engine, 3d style"]


def test_a_reloaded_tokenizer_puts_bos_first_pads_right_and_spells_unknown_words(tmp_path: Path) -> None:
    build_tokenizer(_PHRASES, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenize(tokenizer, ["Red heart", "zebra", ""])
    assert ids.shape == (3, MAX_LENGTH)
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and (ids[:, -1] == tokenizer.pad_token_id).all()
    assert tokenizer.decode(ids[1], skip_special_tokens=True).strip() == "zebra"


def test_distillation_falls_when_the_student_agrees_with_its_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Student(build_model())
    tokens = tokenize(build_tokenizer(_PHRASES, tmp_path), _PHRASES)
    agreed = student(tokens).detach()
    assert distillation_loss(student(tokens), agreed) < distillation_loss(student(tokens), agreed.roll(1, 0))


def test_padding_does_not_change_an_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Student(build_model()).eval()
    tokens = tokenize(build_tokenizer(_PHRASES, tmp_path), _PHRASES)
    torch.testing.assert_close(student(tokens[:1]), student(tokens)[:1], rtol=1e-4, atol=1e-5)
