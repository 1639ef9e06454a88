"""Time functions, and write results to a file together with the machine and the versions they were measured with."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from ditc.runtime.atomic import write_atomic
from ditc.runtime.machine import library_versions, this_machine

RESULTS = Path(__file__).parent / "results"


def facts() -> dict[str, Any]:
    """Processor, load, Python and package versions."""
    return {
        **asdict(this_machine()),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": library_versions(),
    }


def times_s(call: Callable[[], object], *, warmup: int, repeats: int) -> list[float]:
    """The seconds of each repeat, after `warmup` calls that are not timed."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        before = perf_counter()
        call()
        seconds.append(perf_counter() - before)
    return seconds


def alternating_s(
    candidates: Mapping[str, Callable[[], object]], *, warmup: int, repeats: int
) -> dict[str, list[float]]:
    """The seconds of each candidate's repeats. Candidates alternate, so that other load slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        for _ in range(warmup):
            call()
    for _ in range(repeats):
        for name, call in candidates.items():
            before = perf_counter()
            call()
            seconds[name].append(perf_counter() - before)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes of the values."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "median": middle,
        "quartile_1": low,
        "quartile_3": high,
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


def reset_peak() -> None:
    """Let the peak of this process's memory begin again at the present size.

    Linux alone has it (Documentation/filesystems/proc.rst: clear_refs).
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def write(name: str, results: dict[str, Any]) -> Path:
    """Write the results to benchmarks/results/NAME-DATE.json, with the command and the machine beside them."""
    content = {"command": _command(), "date": _today(), "machine": facts(), "results": results}
    return write_atomic(_path(name), json.dumps(content, indent=1) + "\n")


def earlier(name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The results that `write` has written today for the same question, so that a run that was ended goes on.

    Args:
        asked: what decides the results. They hold it under "asked".

    Returns:
        {} if there are none, or another question was asked.
    """
    if not _path(name).is_file():
        return {}
    results: dict[str, Any] = json.loads(_path(name).read_text(encoding="utf-8"))["results"]
    return results if results.get("asked") == asked else {}


def _path(name: str) -> Path:
    return RESULTS / f"{name}-{_today()}.json"


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def _command() -> str:
    """The command line, without the places of files on this machine: the module's name, and the ends of paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])
