"""What the benchmarks of `ditc serve --ray` make of their measurements, and how they go on after an end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, ray_chaos, replicas
from benchmarks.machine import earlier, write


def test_results_of_the_same_question_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    assert earlier("some", {"seconds": 3.0}) == {}
    results = {"asked": {"seconds": 3.0}, "parts": [1]}
    write("some", results)
    assert earlier("some", {"seconds": 3.0}) == results
    assert earlier("some", {"seconds": 4.0}) == {} == earlier("other", {"seconds": 3.0})


def measured(server: str, pictures: float, p50: float) -> dict[str, Any]:
    return {"server": server, "pictures_per_s": pictures, "latency_ms": {"median": p50}}


def test_gain_and_overhead_are_those_of_the_medians() -> None:
    rounds = [
        *(measured("single", each, 30.0) for each in (1.0, 1.1, 0.1)),
        *(measured("one", each, p50) for each, p50 in ((1.0, 41.0), (1.0, 40.0), (5.0, 90.0))),
        *(measured("two", 1.9, 50.0) for _ in range(3)),
    ]
    found = replicas.summary(rounds)
    assert (found["gain"], found["overhead_ms"]) == (1.9, 11.0)
    assert found["single"] == {"pictures_per_s": 1.0, "p50_ms": 30.0, "rounds": 3}
    assert "gain" not in replicas.summary(rounds[:4]) and replicas.summary([]) == {}


def test_parts_of_a_run_are_added_up() -> None:
    part = {
        "seconds": 40.0,
        "answered": 7,
        "wrong": 0,
        "unanswered": 1,
        "sent_again": {"again after 503": 2},
        "kills_of_replicas": 1,
        "kills_of_the_front": 0,
        "seconds_until_whole_again": [3.0],
        "p50_s": 1.0,
        "p99_s": 2.0,
    }
    other = {**part, "p99_s": 4.0, "seconds_until_whole_again": [5.0, 1.0], "exit_code": 1}
    found = ray_chaos.summary([part, other])
    assert (found["seconds"], found["answered"], found["unanswered"]) == (80.0, 14, 2)
    assert found["sent_again"] == {"again after 503": 4} and found["failed_exits"] == 1
    assert (found["largest_seconds_until_whole_again"], found["largest_p99_s"]) == (5.0, 4.0)
