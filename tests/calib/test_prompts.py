"""Prompt files: the built-in ones are varied, and a bad line in a user's file is named by its number."""

from __future__ import annotations

import pytest

from ditc.calib.prompts import GENERAL, read_prompts
from ditc.runtime.errors import UsageError


def test_the_built_in_prompts_cover_lengths_and_scripts():
    prompts = read_prompts(GENERAL)
    words = [len(prompt.split()) for prompt in prompts]
    scripts = {"LATIN": 0x41, "CYRILLIC": 0x400, "GREEK": 0x370, "ARABIC": 0x600, "DEVANAGARI": 0x900}
    assert len(prompts) >= 256 and min(words) == 1 and max(words) > 40
    for start in (*scripts.values(), 0x4E00, 0x3040, 0xAC00, 0x0E00, 0x0590):
        assert any(start <= ord(character) < start + 0x100 for prompt in prompts for character in prompt), (
            hex(start)
        )


def test_the_demo_models_prompts_name_a_concept_and_a_style():
    prompts = read_prompts(GENERAL.with_name("demo.txt"))
    assert len(prompts) >= 256 and all(prompt.endswith(" style") for prompt in prompts)


def test_comments_blank_lines_and_a_byte_order_mark_are_not_prompts(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbf# mine\r\n\r\na cat\r\n  a dog  \n")
    assert read_prompts(path) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"# only a comment\n\n", "holds no prompts"),
        (b"a cat\nx\xff\n", "line 2: not UTF-8"),
        (b"a cat\na dog\na cat\n", "line 3: this is the same prompt as line 1"),
        (b"a cat\n" + b"x" * 5000, "line 2 has 5000 characters, but a prompt has at most"),
        (b"a\x00cat\n", "line 1 has control characters"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, content, message):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_prompts(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot read prompts"):
        read_prompts(tmp_path / "none.txt")
