"""From the seconds of all runs to medians, rates and shares of the machine's ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ditc.runtime.bench.ceilings import Ceilings
from ditc.runtime.bench.choices import Candidate, Case
from ditc.runtime.bench.flops import Unknown, count_flops
from ditc.runtime.bench.graph import Graph, read_graph
from ditc.runtime.bench.measure import CandidateResult, CaseResult
from ditc.runtime.bundle.bench_record import BenchEntry, CaseTimes, Measured, Spread
from ditc.runtime.bundle.certificate import artifact_set
from ditc.runtime.bundle.jsondata import to_json
from ditc.runtime.bundle.manifest import Artifact, Manifest
from ditc.runtime.cpu_features import cpu_features
from ditc.runtime.machine import this_machine
from ditc.runtime.sessions.registry import is_graph, library_version
from ditc.runtime.spec import Precision


def spread(seconds: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile (linear between two values)."""
    low, middle, high = np.percentile(seconds, (10, 50, 90))
    return Spread(median_s=float(middle), p10_s=float(low), p90_s=float(high), repeats=len(seconds))


def entry(
    candidates: Sequence[Candidate], results: Mapping[str, CandidateResult], threads: int
) -> BenchEntry:
    """The results in the form that a bundle keeps."""
    return BenchEntry(
        machine=this_machine(),
        cpu_features=cpu_features(),
        threads=threads,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        candidates=tuple(_measured(candidate, results[candidate.name]) for candidate in candidates),
    )


def _measured(candidate: Candidate, result: CandidateResult) -> Measured:
    return Measured(
        backend=candidate.backend,
        precision=candidate.precision,
        artifact_set=artifact_set(candidate.artifacts),
        library=library_version(candidate.backend),
        load_s=float(np.median(result.load_s)),
        first_picture_s=float(np.median(result.first_s)),
        peak_bytes=result.peak_bytes,
        cases=tuple(_case_times(case, found) for case, found in result.cases.items()),
    )


def _case_times(case: Case, found: CaseResult) -> CaseTimes:
    return CaseTimes(
        height=case.height,
        width=case.width,
        batch=case.batch,
        steps=case.steps,
        new_prompt=spread(found.seconds["new prompt"]),
        cached_prompt=spread(found.seconds["cached prompt"]),
        stages={name: spread(seconds) for name, seconds in found.stages.items()},
    )


class Work:
    """What the stages of a bundle have to do: operations, counted in their graphs, and bytes of weights."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._bundle, self._manifest = bundle, manifest
        self._graphs: dict[str, Graph | None] = {}

    def flops(self, stage: str, runs: Sequence[Mapping[str, Sequence[int]]]) -> int | None:
        """The operations of some runs, from the shapes of their inputs; None if the graph does not say."""
        if stage not in self._graphs:
            self._graphs[stage] = self._read(stage)
        graph = self._graphs[stage]
        try:
            return None if graph is None else sum(count_flops(graph, shapes) for shapes in runs)
        except Unknown:
            return None

    def _read(self, stage: str) -> Graph | None:
        graphs = [artifact for artifact in self._manifest.stages[stage].artifacts if is_graph(artifact)]
        if not graphs:
            return None
        # All precisions of a stage compute the same products. Those of 8 bits may be written in other ways.
        plain = min(graphs, key=lambda artifact: list(Precision).index(artifact.precision))
        return read_graph(self._bundle / plain.file.path)


def stage_rows(
    candidate: Candidate, found: CaseResult, work: Work, ceilings: Ceilings
) -> dict[str, dict[str, Any]]:
    """For every stage its spread, its operations and bytes, and its shares of the ceilings (None on a GPU).

    The share of a ceiling is the time that the stage would take at that rate, as a part of the time that it takes.
    """
    rows = {}
    for name, seconds in found.stages.items():
        row: dict[str, Any] = to_json(spread(seconds))
        artifact, runs = candidate.artifacts[name], found.shapes[name]
        flops, moved = work.flops(name, runs), len(runs) * _weight_bytes(artifact)
        on_cpu = found.kinds.get(name) == "cpu"
        gemm = ceilings.of(artifact.precision) if on_cpu else None
        row["precision"], row["flops"], row["weight_bytes"] = artifact.precision.value, flops, moved
        row["gemm_share"] = _share(flops, gemm.per_second if gemm else None, row["median_s"])
        row["copy_share"] = _share(moved, ceilings.copy.per_second if on_cpu else None, row["median_s"])
        rows[name] = row
    return rows


def _weight_bytes(artifact: Artifact) -> int:
    return sum(ref.size_bytes for ref in (artifact.file, *artifact.data))


def _share(amount: int | None, rate: float | None, seconds: float) -> float | None:
    return None if amount is None or rate is None else amount / rate / seconds
