"""A line of an input file becomes a request, or an error that names the line and says what to do."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from ditc.runtime.errors import UsageError
from ditc.runtime.offline.lines import FIELDS, MAX_LINE_BYTES, derived_seed, parse_line
from ditc.runtime.request import Request


def parse(number: int = 1, **given: Any):
    return parse_line(json.dumps(given).encode(), number)


def test_a_line_is_the_request_with_the_same_arguments() -> None:
    given = {
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "num_inference_steps": 4,
        "guidance_scale": 3,
        "seed": 9,
    }
    assert parse(**given).request() == Request(**given)


def test_short_forms_stand_for_the_long_ones() -> None:
    long = parse(prompt="a cat", width=512, height=768, num_inference_steps=4)
    assert parse(prompt="a cat", size="512x768", steps=4) == long


def test_a_field_that_is_null_counts_as_left_out() -> None:
    assert parse(prompt="a cat", seed=None, id=None, width=None) == parse(prompt="a cat")


def test_every_argument_of_a_request_is_a_field_or_refused_by_name() -> None:
    for field in fields(Request):
        if field.name not in FIELDS:
            with pytest.raises(UsageError, match=f"line 1: {field.name} cannot be"):
                parse(**{"prompt": "a cat", field.name: 1})


def test_a_derived_seed_depends_on_number_and_content_alone() -> None:
    seed = parse(3, prompt="a cat", steps=4).seed
    assert seed == parse(3, num_inference_steps=4, prompt="a cat", id="x").seed
    # As computed when the rule was made: a seed must not change between versions.
    assert seed == derived_seed(3, {"prompt": "a cat", "num_inference_steps": 4}) == 3211626838
    assert len({seed, parse(4, prompt="a cat", steps=4).seed, parse(3, prompt="a cat", steps=5).seed}) == 3
    assert parse(3, prompt="a cat", seed=0).seed == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"{", "it is not JSON"),
        (b"\xff", "it is not UTF-8 at byte 0"),
        (b"[1]", "not a JSON object"),
        (b'{"prompt": NaN}', "NaN is not a number in JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is given twice"),
        (b'{"prompt": "\\ud800"}', "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b'{"prompt": "' + b"a" * MAX_LINE_BYTES + b'"}', "more than 1048576 bytes"),
        (b'{"seed": 1}', "it has no prompt"),
        (b'{"prompt": ["a", "b"]}', "prompt is ['a', 'b']"),
        (b'{"prompt": "a", "promt": 1}', "a request has no field 'promt'"),
        (b'{"prompt": "a", "seed": true}', "seed is true"),
        (b'{"prompt": "a", "seed": 1.5}', "seed is 1.5"),
        (b'{"prompt": "a", "guidance_scale": "3"}', "guidance_scale is '3'"),
        (b'{"prompt": "a", "steps": 0}', "num_inference_steps is 0"),
        (b'{"prompt": "a", "size": "512"}', "size is '512'"),
        (b'{"prompt": "a", "size": "64x64", "width": 64}', "size and width are both given"),
        (b'{"prompt": "a", "num_images_per_prompt": 65}', "num_images_per_prompt is 65"),
        (b'{"prompt": "a", "use_resolution_binning": "no"}', "use_resolution_binning is 'no'"),
        (b'{"prompt": "a", "id": 7}', "id is 7"),
    ],
)
def test_a_wrong_line_is_named_with_a_hint(content: bytes, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_line(content, 12)
    assert str(raised.value).startswith("line 12: ") and message in str(raised.value) and raised.value.hint


def test_the_hint_for_an_unknown_field_names_the_nearest_one() -> None:
    with pytest.raises(UsageError) as raised:
        parse(prompt="a", num_inference_step=4)
    assert raised.value.hint == "did you mean num_inference_steps?"
