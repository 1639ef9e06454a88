"""Results of benchmarks/cpu_peers.py: from recorded rounds to medians, spreads, ratios, and a table as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.peer_cases import BASELINE

COLUMNS = ("contestant", "median ms", "p10..p90", "rounds", "x as fast", "fidelity", "peak MB", "to 1st s")


def summary(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a case's state says of each contestant, by operation.

    "times_as_fast" is the baseline's time divided by the contestant's within each round: median, p10 and p90. Fidelity
    is taken from all rounds, and time only from those that count.
    """
    operations: dict[str, dict[str, Any]] = {}
    for record in state["rounds"]:
        for operation, seconds in record["operations"].items():
            rows = operations.setdefault(operation, {})
            for name, value in seconds.items():
                row = rows.setdefault(name, {"seconds": [], "ratios": [], "fidelity": []})
                if record["counts"]:
                    row["seconds"].append(value)
                    row["ratios"] += [seconds[BASELINE] / value] if BASELINE in seconds else []
                if name in record["fidelity"].get(operation, {}):
                    row["fidelity"].append(record["fidelity"][operation][name])
    counted = sum(record["counts"] for record in state["rounds"])
    return {
        "operations": {
            operation: {name: _row(row) for name, row in rows.items() if row["seconds"]}
            for operation, rows in operations.items()
        },
        "loaded": state["loaded"],
        "failed": state["failed"],
        "rounds": counted,
        "rounds_disturbed_by_other_programs": len(state["rounds"]) - counted,
    }


def _row(row: Mapping[str, list[Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds": quantiles(row["seconds"])}
    if row["ratios"]:
        found["times_as_fast"] = quantiles(row["ratios"])
    if row["fidelity"]:
        for metric in row["fidelity"][0]:
            values = [each[metric] for each in row["fidelity"]]
            found[metric] = {
                "mean": float(np.mean(values)),
                "worst": min(values) if metric == "psnr_db" else max(values),
                "compared": len(values),
            }
    return found


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, p10, p90 and the number of values."""
    low, middle, high = (float(q) for q in np.quantile(values, [0.1, 0.5, 0.9]))
    return {"median": middle, "p10": low, "p90": high, "repeats": len(values)}


def table(title: str, result: Mapping[str, Any]) -> str:
    """The result of one case as a table for people, in Markdown, fastest first."""
    lines: list[str] = []
    for operation, rows in result["operations"].items():
        lines += ["", f"**{title}: {operation}**" if len(result["operations"]) > 1 else f"**{title}**", ""]
        lines += _markdown(COLUMNS, _cells(rows, result["loaded"]))
    if disturbed := result["rounds_disturbed_by_other_programs"]:
        lines += ["", f"{disturbed} more rounds are not counted, because other programs ran meanwhile."]
    lines += [f"- not measured: {name}: {why}" for name, why in result["failed"].items()]
    return "\n".join(lines).strip() + "\n"


def _cells(rows: Mapping[str, Any], loaded: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, row in sorted(rows.items(), key=lambda item: item[1]["seconds"]["median"]):
        seconds, ratio = row["seconds"], row.get("times_as_fast")
        facts = loaded.get(name, {})
        starts = [
            start["to_first_result_s"] for start in facts.get("starts", ()) if "to_first_result_s" in start
        ]
        yield (
            name,
            _ms(seconds["median"]),
            f"{_ms(seconds['p10'])}..{_ms(seconds['p90'])}",
            str(seconds["repeats"]),
            f"{ratio['median']:.2f}" if ratio else "",
            _fidelity(row),
            f"{facts['peak_mb']:.0f}" if facts.get("peak_mb") else "",
            f"{min(starts):.1f}" if starts else "",
        )


def _fidelity(row: Mapping[str, Any]) -> str:
    if "psnr_db" in row:
        return f"{row['psnr_db']['mean']:.1f} dB (least {row['psnr_db']['worst']:.1f})"
    return f"{row['relative_l2']['mean']:.1e}" if "relative_l2" in row else ""


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
