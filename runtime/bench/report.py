"""The result of a benchmark as JSON, and as tables for people."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ditc.runtime.bench.ceilings import Ceilings
from ditc.runtime.bench.choices import Candidate, Case
from ditc.runtime.bench.measure import MODES, CandidateResult, Effort
from ditc.runtime.bench.summary import Work, spread, stage_rows
from ditc.runtime.bench.text_table import aligned
from ditc.runtime.bundle.bench_record import BenchEntry
from ditc.runtime.bundle.jsondata import to_json
from ditc.runtime.bundle.manifest import Manifest
from ditc.runtime.machine import library_versions

Json = dict[str, Any]


def as_json(
    bundle: Path,
    manifest: Manifest,
    candidates: Sequence[Candidate],
    results: Mapping[str, CandidateResult],
    ceilings: Ceilings,
    entry: BenchEntry,
    effort: Effort,
) -> Json:
    """Everything that was measured, with the machine and the versions beside it."""
    work = Work(bundle, manifest)
    return {
        "bundle": str(bundle),
        "digest": manifest.digest,
        "date": entry.date,
        "machine": to_json(entry.machine),
        "cpu_features": list(entry.cpu_features),
        "threads": entry.threads,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": library_versions(),
        "repeats": effort.repeats,
        "warmup": effort.warmup,
        "ceilings": {
            "gemm_flops_per_s": {name: asdict(found) for name, found in ceilings.gemm.items()},
            "copy_bytes_per_s": asdict(ceilings.copy),
        },
        "candidates": [
            _candidate(candidate, results[candidate.name], work, ceilings) for candidate in candidates
        ],
    }


def _candidate(candidate: Candidate, result: CandidateResult, work: Work, ceilings: Ceilings) -> Json:
    cases = []
    for case, found in result.cases.items():
        new, cached = (spread(found.seconds[mode]) for mode in MODES)
        cases.append(
            {
                **asdict(case),
                "first_s": found.first_s,
                "new_prompt": to_json(new),
                "cached_prompt": to_json(cached),
                "pictures_per_s": case.batch / new.median_s,
                "stages": stage_rows(candidate, found, work, ceilings),
            }
        )
    return {
        "name": candidate.name,
        "backend": candidate.backend.value,
        "precision": candidate.precision.value,
        "chosen": result.chosen,
        "stages": {
            name: f"{artifact.backend} {artifact.precision.value}"
            for name, artifact in candidate.artifacts.items()
        },
        "start_s": result.start_s,
        "load_s": result.load_s,
        "first_picture_s": result.first_s,
        "peak_bytes": result.peak_bytes,
        "final_peak_bytes": result.final_peak_bytes,
        "gpu_peak_bytes": result.gpu_peak_bytes,
        "cases": cases,
    }


def as_text(report: Json) -> Iterator[str]:
    """The lines of the tables."""
    machine, features = report["machine"], " ".join(report["cpu_features"]) or "features unknown"
    yield f"{machine['processor']}, {report['threads']} threads, {features}"
    load = "" if report["load"] is None else f"; load {report['load'][0]:.1f}"
    yield f"median (10th to 90th percentile) of {report['repeats']} drawings, in ms{load}"
    candidates = report["candidates"]
    for number, case in enumerate(candidates[0]["cases"]):
        yield ""
        yield f"{Case(**{name: case[name] for name in ('height', 'width', 'batch', 'steps')})}"
        yield from aligned(_case_rows(candidates, number))
    yield ""
    yield from aligned(_process_rows(candidates))
    yield ""
    yield "ceilings: " + ", ".join(
        [
            *(
                f"{name} {found['per_second'] / 1e9:.0f} GFLOP/s ({found['library']})"
                for name, found in report["ceilings"]["gemm_flops_per_s"].items()
            ),
            f"copy {report['ceilings']['copy_bytes_per_s']['per_second'] / 1e9:.1f} GB/s",
        ]
    )
    yield "share of a ceiling: the time at that rate, as a part of the time taken; gemm counts products, copy weights"


def _case_rows(candidates: Sequence[Json], number: int) -> Iterator[list[str]]:
    cases = [candidate["cases"][number] for candidate in candidates]
    yield ["", *(candidate["name"] for candidate in candidates)]
    for mode in ("new_prompt", "cached_prompt"):
        yield [f"picture, {mode.replace('_', ' ')}", *(_times(case[mode]) for case in cases)]
    yield ["pictures per second", *(f"{case['pictures_per_s']:.3g}" for case in cases)]
    stages = dict.fromkeys(name for case in cases for name in case["stages"])
    for name in stages:
        rows = [case["stages"].get(name) for case in cases]
        yield [
            "denoiser, one step" if name == "denoiser" else name,
            *("-" if row is None else _times(row) for row in rows),
        ]
        if any(row and row["gemm_share"] is not None for row in rows):
            yield ["  share of gemm, copy", *("-" if row is None else _shares(row) for row in rows)]


def _process_rows(candidates: Sequence[Json]) -> Iterator[list[str]]:
    yield ["new process", *(candidate["name"] for candidate in candidates)]
    for title, name in (("start", "start_s"), ("load", "load_s"), ("first picture", "first_picture_s")):
        yield [f"{title}, s", *(f"{_middle(c[name]):.2f}" for c in candidates)]
    total = [sum(_middle(c[n]) for n in ("start_s", "load_s", "first_picture_s")) for c in candidates]
    yield ["all three, s", *(f"{seconds:.2f}" for seconds in total)]
    yield ["first at each shape, s", *(_firsts(c) for c in candidates)]
    for title, name in (
        ("peak memory, MB", "peak_bytes"),
        ("peak after all cases, MB", "final_peak_bytes"),
        ("GPU peak, MB", "gpu_peak_bytes"),
    ):
        if any(c[name] is not None for c in candidates):
            yield [title, *("-" if c[name] is None else f"{c[name] / 1e6:.0f}" for c in candidates)]


def _firsts(candidate: Json) -> str:
    return " ".join(f"{case['first_s']:.2f}" for case in candidate["cases"])


def _times(row: Mapping[str, float]) -> str:
    low, middle, high = (1e3 * row[name] for name in ("p10_s", "median_s", "p90_s"))
    digits = 1 if middle < 100 else 0
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def _shares(row: Json) -> str:
    shares = [row["gemm_share"], row["copy_share"]]
    kind = row["precision"]
    return f"{', '.join('-' if share is None else f'{share:.0%}' for share in shares)} {kind}"


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
