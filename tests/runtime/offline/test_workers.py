"""Processes that end are replaced, no line is lost, and only a line that ends them twice fails."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ditc.runtime.errors import BundleError, SessionError
from ditc.runtime.offline import workers
from ditc.runtime.offline.input_file import RawLine
from ditc.runtime.offline.workers import draw_lines


@pytest.fixture(autouse=True)
def dying_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WORKER", "dying_worker")
    path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)


def lines(*prompts: str) -> Iterator[RawLine]:
    for number, prompt in enumerate(prompts, 1):
        yield RawLine(number=number, offset=0, content=json.dumps({"prompt": prompt}).encode())


def drawn(folder: Path, count: int, *prompts: str) -> dict[int, dict[str, Any]]:
    results = list(draw_lines(lines(*prompts), [{"folder": str(folder)}] * count))
    assert len({result["line"] for result in results}) == len(results) == len(prompts)
    return {result["line"]: result for result in results}


@pytest.mark.parametrize("count", [1, 2])
def test_lines_that_a_process_was_at_when_it_ended_are_drawn_again(tmp_path: Path, count: int) -> None:
    results = drawn(tmp_path, count, "once", *"abcdefgh")  # the process has three lines at a time
    assert {result["status"] for result in results.values()} == {"done"}


def test_only_the_line_that_ends_its_process_twice_fails(tmp_path: Path) -> None:
    results = drawn(tmp_path, 1, "a", "b", "always", *"cdefg")
    assert [number for number, result in results.items() if result["status"] == "failed"] == [3]
    assert results[3]["error"]["message"] == "the process that drew this line was ended by signal 9, twice"


def test_processes_that_end_again_and_again_end_the_batch(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="4 processes have ended, the last of which was ended by signal 9"):
        drawn(tmp_path, 2, *["always"] * 20)


def test_what_keeps_a_process_from_starting_is_raised() -> None:
    with pytest.raises(BundleError, match="the bundle is damaged"):
        list(draw_lines(lines("a"), [{"error": "the bundle is damaged"}]))


def test_without_lines_nothing_is_waited_for(tmp_path: Path) -> None:
    assert drawn(tmp_path, 1) == {}
