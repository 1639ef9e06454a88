"""A line of an input file becomes a request, or an error that names the line and says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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
    assert parse(**given).request(Path()) == Request(**given)


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
        (b'{"prompt": ["a", "b"]}', "prompt is ['a', 'b'], not one text"),
        (b'{"prompt": "a", "promt": 1}', "a request has no field 'promt'"),
        (b'{"prompt": "a", "seed": true}', "seed is true, not a number"),
        (b'{"prompt": "a", "seed": 1.5}', "seed is 1.5"),
        (b'{"prompt": "a", "guidance_scale": "3"}', "guidance_scale is '3'"),
        (b'{"prompt": "a", "steps": 0}', "num_inference_steps is 0"),
        (b'{"prompt": "a", "size": "512"}', "size is '512', not width x height"),
        (b'{"prompt": "a", "size": "64x64", "width": 64}', "size and width are both given"),
        (
            b'{"prompt": "a", "num_images_per_prompt": 65}',
            "num_images_per_prompt is 65, and a line has at most 64",
        ),
        (
            b'{"prompt": "a", "use_resolution_binning": "no"}',
            "use_resolution_binning is 'no', not true or false",
        ),
        (b'{"prompt": "a", "id": 7}', "id is 7, not a text"),
        (b'{"prompt": "a", "image": "/etc/a.png"}', "leads out of the input file's folder"),
        (b'{"prompt": "a", "image": "edges/../../a.png"}', "leads out of the input file's folder"),
        (b'{"prompt": "a", "image": "C:a.png"}', "leads out of the input file's folder"),
        (b'{"prompt": "a", "image": ""}', "image is '', not the path of a picture"),
        (b'{"prompt": "a", "image": "a\\u0000.png"}', "image is "),
        (b'{"prompt": "a", "control_image": ["a.png"]}', "control_image is ['a.png'], not the path"),
        (b'{"prompt": "a", "control_image": 5}', "control_image is 5, not the path of a picture"),
        (b'{"prompt": "a", "control_image": "data:image/png;base64,AA"}', "not a path"),
        (b'{"prompt": "a", "mask_image": "a.png"}', "mask_image is given without an image"),
        (b'{"prompt": "a", "strength": 0.5}', "strength is given without an image"),
        (b'{"prompt": "a", "image": "a.png", "strength": 2}', "strength is 2"),
        (b'{"prompt": "a", "image": "a.png", "strength": true}', "strength is true"),
        (b'{"prompt": "a", "control_guidance_end": 1}', "given without a control_image"),
    ],
)
def test_a_wrong_line_is_named_with_a_hint(content: bytes, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_line(content, 12)
    assert str(raised.value).startswith("line 12: ") and message in str(raised.value) and raised.value.hint


def test_a_picture_is_read_from_the_input_files_folder(tmp_path: Path) -> None:
    (tmp_path / "edges").mkdir()
    Image.new("RGB", (6, 4), "white").save(tmp_path / "edges" / "a.png")
    line = parse(prompt="a", control_image="edges/a.png", controlnet_conditioning_scale=0.5)
    line.check_files(tmp_path)
    request = line.request(tmp_path)
    assert request.control_image.size == (6, 4) and request.controlnet_conditioning_scale == 0.5
    assert line.seed == derived_seed(1, line.asked)  # of the path, so a moved folder draws the same


def _outside(folder: Path) -> None:
    Image.new("RGB", (4, 4)).save(folder.parent / "outside.png")
    (folder / "a.png").symlink_to(folder.parent / "outside.png")


def _in_a_circle(folder: Path) -> None:
    (folder / "a.png").symlink_to(folder / "a.png")


def _no_picture(folder: Path) -> None:
    (folder / "a.png").write_text("a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "cannot be read: .*No such file"),
        (lambda folder: (folder / "a.png").mkdir(), "cannot be read: .*directory"),
        (_no_picture, "is not a picture"),
        (_outside, "a link that leads out of the input file's folder"),
        (_in_a_circle, "cannot be read"),
    ],
    ids=["missing", "folder", "text", "link-outside", "circle"],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    make(folder)
    line = parse(3, prompt="a", image="a.png")
    with pytest.raises(UsageError, match=f"line 3: image .*{message}") as raised:
        line.check_files(folder)
    assert raised.value.hint
    with pytest.raises(UsageError, match=message):
        line.request(folder)


def test_the_hint_for_an_unknown_field_names_the_nearest_one() -> None:
    with pytest.raises(UsageError) as raised:
        parse(prompt="a", num_inference_step=4)
    assert raised.value.hint == "did you mean num_inference_steps?"
