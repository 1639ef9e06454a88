"""Profiles of candidates as JSON and as tables: for every stage, the time by module, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ditc.runtime.bench.choices import Candidate, Case
from ditc.runtime.bench.graph import Graph, read_graph
from ditc.runtime.bench.process import Process
from ditc.runtime.bench.profile import ExecutedNode, ModuleTime, by_kind, by_module, by_pattern
from ditc.runtime.bench.text_table import aligned
from ditc.runtime.bundle.manifest import Artifact, Manifest
from ditc.runtime.sessions.registry import is_graph

Json = dict[str, Any]

ROWS = 20
KINDS = 6


def profile_candidate(
    bundle: Path, manifest: Manifest, candidate: Candidate, case: Case, prompts: list[str]
) -> Json:
    """The profile of every stage of a candidate, from a process of its own: seconds of a run, and its modules.

    Raises:
        DitcError: the candidate cannot load the bundle or draw the case.
    """
    with Process(candidate, bundle) as process:
        found = process.ask("profile", case=asdict(case), prompts=prompts)
    stages: Json = {}
    for name, profile in found.items():
        if profile is not None:
            nodes = [ExecutedNode(**{**node, "origins": tuple(node["origins"])}) for node in profile["nodes"]]
            graph = _graph(bundle, manifest, name, candidate.artifacts[name])
            modules = by_module(nodes, graph)
            stages[name] = {
                "run_s": profile["run_s"],
                "runs": profile["runs"],
                "nodes_s": sum(node.seconds for node in nodes),
                "modules": [asdict(each) for each in modules],
            }
    return {"name": candidate.name, "case": asdict(case), "stages": stages}


def _graph(bundle: Path, manifest: Manifest, stage: str, artifact: Artifact) -> Graph:
    """The ONNX graph that the artifact is, or was made from: that of its precision."""
    graphs = [a for a in manifest.stages[stage].artifacts if is_graph(a)]
    same = [a for a in graphs if a.precision is artifact.precision] or graphs
    return read_graph(bundle / same[0].file.path) if same else Graph(nodes=(), shapes={}, functions={})


def as_text(profiles: Sequence[Json]) -> Iterator[str]:
    """The lines of the tables. A star in a path stands for the number of a block: its layers are added up."""
    for stage in dict.fromkeys(name for profile in profiles for name in profile["stages"]):
        have = [profile for profile in profiles if stage in profile["stages"]]
        yield ""
        yield f"{stage}: ms of one run by module, for {Case(**have[0]['case'])}"
        yield from aligned(_rows([profile["name"] for profile in have], [p["stages"][stage] for p in have]))


def _rows(names: Sequence[str], stages: Sequence[Json]) -> Iterator[list[str]]:
    modules = [[ModuleTime(**each) for each in stage["modules"]] for stage in stages]
    seconds = [by_pattern(each) for each in modules]
    yield ["", *names]
    yield ["a run, with the profiler", *(_ms(stage["run_s"]) for stage in stages)]
    yield ["outside of all nodes", *(_ms(max(0.0, stage["run_s"] - stage["nodes_s"])) for stage in stages)]
    largest = sorted(
        dict.fromkeys(name for each in seconds for name in each),
        key=lambda name: -max(each.get(name, 0.0) for each in seconds),
    )
    for name in largest[:ROWS]:
        yield [
            name,
            *(_part(each.get(name, 0.0), stage) for each, stage in zip(seconds, stages, strict=True)),
        ]
    if rest := largest[ROWS:]:
        sums = [sum(each.get(name, 0.0) for name in rest) for each in seconds]
        yield [
            f"{len(rest)} more",
            *(_part(amount, stage) for amount, stage in zip(sums, stages, strict=True)),
        ]
    kinds = [list(by_kind(each).items())[:KINDS] for each in modules]
    for place in range(max(len(each) for each in kinds)):
        yield [
            "by operation" if place == 0 else "",
            *(_kind(each, place, stage) for each, stage in zip(kinds, stages, strict=True)),
        ]


def _kind(kinds: Sequence[tuple[str, float]], place: int, stage: Mapping[str, Any]) -> str:
    return f"{kinds[place][0]} {_part(kinds[place][1], stage)}" if place < len(kinds) else ""


def _part(seconds: float, stage: Mapping[str, Any]) -> str:
    share = seconds / stage["nodes_s"] if stage["nodes_s"] else 0.0
    return f"{_ms(seconds)} {share:4.0%}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"
