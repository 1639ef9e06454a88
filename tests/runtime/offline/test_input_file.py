"""An input file is checked as a whole, and read line by line."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest

from ditc.runtime.errors import UsageError
from ditc.runtime.offline.input_file import NAMED, check_input, lines_of_span, raw_lines
from ditc.runtime.offline.lines import MAX_LINE_BYTES


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_good_file_is_described(tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b", "id": "x"})
    found = check_input(path)
    assert (found.lines, found.wrong, found.repeated) == (2, (), {})
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    found.check()


def test_wrong_lines_are_all_counted_and_the_first_are_named(tmp_path: Path) -> None:
    found = check_input(written(tmp_path / "in.jsonl", {"prompt": "a"}, *["{"] * (NAMED + 5), ""))
    assert found.wrong_count == NAMED + 6
    with pytest.raises(
        UsageError, match=r"line 2: it is not JSON.*line 11: .*and 6 more wrong lines"
    ) as raised:
        found.check()
    assert "--skip-invalid" in str(raised.value.hint)


def test_every_wrong_line_says_what_was_expected(tmp_path: Path) -> None:
    found = check_input(
        written(tmp_path / "in.jsonl", {"prompt": "a", "seed": 1.5}, {"prompt": "a", "steps": 0})
    )
    with pytest.raises(UsageError) as raised:
        found.check()
    assert len(found.wrong) == 2
    for error in found.wrong:
        assert f"{error} ({error.hint})" in str(raised.value)


def test_an_id_that_comes_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "id": name} for name in ("x", "y", "x", "z", "x")]
    found = check_input(written(tmp_path / "in.jsonl", *lines))
    assert found.repeated == {3: 1, 5: 1} and found.wrong_count == 2
    with pytest.raises(
        UsageError,
        match=r"line 3: its id 'x' is that of line 1 \(.*\); line 5: its id 'x' is that of line 1 \(",
    ):
        found.check()


def test_other_ids_with_equal_hashes_are_no_repetition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ditc.runtime.offline.input_file as module

    class Same:
        def __init__(self, content: bytes = b"") -> None: ...
        def update(self, content: bytes) -> None: ...
        def digest(self) -> bytes:
            return bytes(32)

        def hexdigest(self) -> str:
            return ""

    monkeypatch.setattr(module, "hashlib", type("hashes", (), {"sha256": Same}))
    lines = [{"prompt": "a", "id": name} for name in ("x", "y", "x")]
    assert check_input(written(tmp_path / "in.jsonl", *lines)).repeated == {3: 1}


def test_a_file_without_lines_or_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for path, message in (
        (tmp_path / "empty.jsonl", "holds no lines"),
        (tmp_path / "none.jsonl", "cannot read"),
    ):
        with pytest.raises(UsageError, match=message):
            check_input(path)


def test_lines_keep_numbers_and_offsets_whatever_their_ends_are(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    content = b'\xef\xbb\xbf{"a":1}\r\n' + b"x" * (2 * MAX_LINE_BYTES) + b'\n{"b":2}\n{"c":3}'
    path.write_bytes(content)
    lines = list(raw_lines(path))
    assert [line.number for line in lines] == [1, 2, 3, 4]
    assert [lines[i].content for i in (0, 2, 3)] == [b'{"a":1}', b'{"b":2}', b'{"c":3}']
    assert len(lines[1].content) > MAX_LINE_BYTES  # so that it is refused
    assert content[lines[3].offset :] == b'{"c":3}'
    assert list(lines_of_span(path, lines[2].offset, [3, 4])) == lines[2:]
    assert list(lines_of_span(path, lines[0].offset, [1, 4])) == [lines[0], lines[3]]


def test_the_check_keeps_no_lines_in_memory(tmp_path: Path) -> None:
    line = {"prompt": "a" * 1000}
    path = written(tmp_path / "in.jsonl", *[line] * 1200)
    check_input(path)  # imports
    tracemalloc.start()
    try:
        check_input(path)
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
    finally:
        tracemalloc.stop()
