"""Draws the pictures of a benchmark: candidates side by side, in turn, in a random order that changes every time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import sleep
from typing import Any, Literal

from ditc.runtime.bench.choices import Candidate, Case
from ditc.runtime.bench.process import Process
from ditc.runtime.bench.prompts import Prompts
from ditc.runtime.spec import CONTROLNET, DENOISER

Mode = Literal["new prompt", "cached prompt"]
MODES: tuple[Mode, ...] = ("new prompt", "cached prompt")
# Threads of one candidate that still spin must not slow the next one.
GAP_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How often everything is done.

    Attributes:
        repeats: drawings of every case, with new and with cached prompts each, that count.
        warmup: drawings before those, which do not count.
        loads: how many new processes load every candidate.
    """

    repeats: int = 10
    warmup: int = 2
    loads: int = 3

    def prompts(self, cases: Sequence[Case]) -> int:
        """How many new prompts all drawings take."""
        return self.loads * cases[0].batch + sum((1 + self.warmup + self.repeats) * c.batch for c in cases)

    def drawings(self, candidates: int, cases: int) -> int:
        """How many drawings there are, which is what the progress bar counts."""
        return candidates * (self.loads + cases * len(MODES) * (self.warmup + self.repeats))


@dataclass(kw_only=True)
class CaseResult:
    """What was measured of a candidate in one case.

    Attributes:
        first_s: the first drawing at these shapes in the process, with a new prompt.
        seconds: of all drawings that count, by mode.
        stages: by stage, the seconds of every step of the denoiser and of a ControlNet, or of every drawing's runs of
            another stage.
        shapes: by stage, the shapes of the inputs of the runs that one entry of `stages` adds up.
        kinds: by stage, the kind of processor that computed it.
    """

    first_s: float = 0.0
    seconds: dict[Mode, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    stages: dict[str, list[float]] = field(default_factory=dict)
    shapes: dict[str, list[Mapping[str, Sequence[int]]]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def add(self, mode: Mode, drawn: Mapping[str, Any]) -> None:
        """Add a drawing, as the worker tells it."""
        self.seconds[mode].append(drawn["seconds"])
        self.kinds = drawn["kinds"]
        for name, runs in drawn["stages"].items():
            if not runs:
                continue  # a text encoder whose rows are cached
            times = [seconds for seconds, _ in runs]
            in_steps = name in (DENOISER, CONTROLNET)
            one = runs[:1] if in_steps else runs
            self.stages.setdefault(name, []).extend(times if in_steps else [sum(times)])
            self.shapes[name] = [shapes for _, shapes in one]


@dataclass(kw_only=True)
class CandidateResult:
    """What was measured of a candidate. Times are those of every new process.

    Attributes:
        start_s, load_s, first_s: until ditc was imported, until all stages were loaded, and the first picture.
        peak_bytes: the largest memory of a process until then; None where the system does not say.
        gpu_peak_bytes: the same on the GPU; None without one.
        chosen: which backend and precision was loaded, and why, in words.
    """

    start_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    gpu_peak_bytes: int | None = None
    final_peak_bytes: int | None = None
    chosen: str = ""
    cases: dict[Case, CaseResult] = field(default_factory=dict)


def measure(
    bundle: Path,
    candidates: Sequence[Candidate],
    cases: Sequence[Case],
    effort: Effort,
    prompts: Prompts,
    *,
    seed: int = 0,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> dict[str, CandidateResult]:
    """Measure every candidate in every case.

    Args:
        seed: of the order in which candidates take turns.
        progress: called with what is being done and the number of drawings that have just been finished.

    Raises:
        DitcError: a candidate cannot load the bundle or draw a picture. The message names it.
    """
    order = random.Random(seed)
    results = {candidate.name: CandidateResult() for candidate in candidates}
    with ExitStack() as stack:
        processes: dict[str, Process] = {}
        for number in range(effort.loads):
            texts = prompts.take(cases[0].batch)
            for candidate in order.sample(candidates, len(candidates)):
                progress(f"loading {candidate.name}", 0)
                process = stack.enter_context(Process(candidate, bundle))
                _add_load(results[candidate.name], process, cases[0], texts)
                progress("", 1)
                if number + 1 < effort.loads:
                    process.close()
                else:
                    processes[candidate.name] = process
        for case in cases:
            _measure_case(case, processes, results, effort, prompts, order, progress)
    return results


def _add_load(result: CandidateResult, process: Process, case: Case, texts: list[str]) -> None:
    drawn = process.ask("draw", case=asdict(case), prompts=texts, seed=0)
    result.start_s.append(process.start_s)
    result.load_s.append(process.load_s)
    result.first_s.append(drawn["seconds"])
    result.chosen = process.chosen
    for name in ("peak_bytes", "gpu_peak_bytes"):
        if drawn[name] is not None:
            setattr(result, name, max(drawn[name], getattr(result, name) or 0))


def _measure_case(
    case: Case,
    processes: Mapping[str, Process],
    results: Mapping[str, CandidateResult],
    effort: Effort,
    prompts: Prompts,
    order: random.Random,
    progress: Callable[[str, int], None],
) -> None:
    turns = [(name, mode) for name in processes for mode in MODES]
    cached = prompts.take(case.batch)
    for name, process in processes.items():
        drawn = process.ask("draw", case=asdict(case), prompts=cached, seed=0)
        results[name].cases[case] = CaseResult(first_s=drawn["seconds"])
    for number in range(effort.warmup + effort.repeats):
        new = prompts.take(case.batch)
        for name, mode in order.sample(turns, len(turns)):
            progress(f"{name}: {case}", 0)
            sleep(GAP_S)
            texts = new if mode == "new prompt" else cached
            drawn = processes[name].ask("draw", case=asdict(case), prompts=texts, seed=number)
            if number >= effort.warmup:
                results[name].cases[case].add(mode, drawn)
            results[name].final_peak_bytes = drawn["peak_bytes"]
            progress("", 1)
