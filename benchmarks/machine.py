"""Where and with what a number was measured, and the file that it goes into."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("ditc", "numpy", "onnxruntime", "torch", "diffusers", "transformers", "onnx")


def facts() -> dict[str, Any]:
    """Processor, load, Python and package versions."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": found,
    }


def times_s(call: Callable[[], object], *, warmup: int, repeats: int) -> list[float]:
    """Seconds of each repeat, after the warm-up."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        before = perf_counter()
        call()
        seconds.append(perf_counter() - before)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "median": middle,
        "quartile_1": low,
        "quartile_3": high,
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


def write(name: str, results: dict[str, Any]) -> Path:
    """benchmarks/results/NAME-DATE.json with the machine beside the numbers."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    path = RESULTS / f"{name}-{today}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"command": " ".join(sys.argv), "date": today, "machine": facts(), "results": results}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
