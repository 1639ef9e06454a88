"""All verbs read files of prompts in the same way."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from ditc.calib import prompts as calibration
from ditc.runtime.errors import UsageError
from ditc.runtime.prompts import read_prompts

FILE = "\ufeff# mine\r\n\r\na cat\r\n  a dog  \na\x0cform feed\n # not this one\na #1 fan".encode()


def test_comments_blank_lines_and_a_byte_order_mark_are_not_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(FILE)
    assert read_prompts(path) == ["a cat", "a dog", "a\x0cform feed", "a #1 fan"]


def test_calibration_reads_the_same_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(FILE.replace(b"\x0c", b" "))
    assert calibration.read_prompts(path) == read_prompts(path)


def test_a_dash_is_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(FILE)))
    assert read_prompts(Path("-"))[:2] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "p.txt holds no prompts"),
        (b"# only a comment\n\n", "p.txt holds no prompts"),
        (b"a cat\nx\xff\n", "p.txt, line 2: not UTF-8 at byte 1"),
        (None, "cannot read prompts from .*p.txt: No such file"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_prompts(path)
    assert caught.value.hint
