"""What ranges rest on is counted, recorded and judged: too little or the wrong words is said, enough is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quant_helpers import ORIGIN, prompt
from tokenizers import Tokenizer, models, pre_tokenizers

from ditc.calib.observe import Observer
from ditc.calib.tokens import count_tokens
from ditc.export.quant.evidence import calibration_of, half_loss_db
from ditc.export.quant.ranges import Ranges, Statistics, half_of
from ditc.runtime.bundle.calibration import Calibration

ENOUGH = Calibration(
    prompts=64,
    num_inference_steps=20,
    usual_steps=20,
    buckets=10,
    bytes_per_token=4.2,
    halves=(30, 34),
    half_loss_db=0.1,
    half_loss_layer="a",
)


def of_halves(first: float, second: float) -> Statistics:
    """Statistics of two halves of normal values, with these standard deviations."""
    values, observer = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)), Observer(buckets=1)
    for observer.half, scale in enumerate((first, second)):
        observer.see("a", values * scale)
    return observer.sites["a"]


def test_halves_that_saw_the_same_agree_and_a_wider_half_is_found():
    assert half_loss_db(of_halves(1.0, 1.0)) == pytest.approx(0, abs=1e-9)
    assert half_loss_db(of_halves(1.0, 4.0)) > 3
    assert half_loss_db(of_halves(4.0, 1.0)) > 3


def test_evidence_counts_prompts_that_differ_in_their_tokens():
    prompts = [prompt(text) for text in ("a cat", "a dog", "red", "blue", "green", "house")]
    twice = replace(prompts[0], text="0" * 16)
    statistics = of_halves(1.0, 1.0)
    found = calibration_of(
        Ranges(origin=ORIGIN, sites={"a": statistics}, site_of={"a": "a"}, prompts=(*prompts, twice))
    )
    second = sum(half_of(one.text) for one in prompts)
    assert found.prompts == len(prompts)
    assert found.halves == (len(prompts) + 1 - second, second)
    assert found.half_loss_layer == "a"


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"prompts": 1}, "rest on 1 prompt"),
        ({"num_inference_steps": 1}, "rest on 1 step"),
        ({"bytes_per_token": 2.4}, "2.4 bytes of text per token"),
        ({"half_loss_db": 6.0}, "two halves of the prompts disagree by 6.0 dB, most at the input of a"),
    ],
)
def test_what_speaks_against_the_ranges_is_named_with_its_number(changes, doubt):
    assert ENOUGH.doubts == ()
    (said,) = replace(ENOUGH, **changes).doubts
    assert doubt in said


def test_a_few_step_model_may_be_calibrated_with_few_steps():
    assert replace(ENOUGH, num_inference_steps=2, usual_steps=2, buckets=2).doubts == ()


def test_unknown_text_counts_a_token_for_each_byte():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1, "cat": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert count_tokens(words.encode("red cat"), "red cat", "<unk>") == 2
    assert count_tokens(words.encode("red кот"), "red кот", "<unk>") == 1 + 6
