"""What a check found: one Result a comparison, gathered in a Report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ditc.runtime.tolerances import Level, Limit, Metric


class Verdict(StrEnum):
    """Not checked is never a pass: what this machine cannot show is said, not assumed."""

    PASS = "pass"
    FAIL = "fail"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """The worst element of a tensor: where it is, and both values."""

    tensor: str
    index: tuple[int, ...]
    candidate: float
    reference: float

    def __str__(self) -> str:
        where = ",".join(map(str, self.index))
        return f"{self.tensor}[{where}] is {self.candidate:.7g}, the reference has {self.reference:.7g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """Where an error begins.

    Attributes:
        module: PyTorch module path; "" is the stage's own top level.
        between: the last place that agreed and the first that did not, when the error is in the module's own code.
        error: relative L2 there. before: at the last place that agreed. worst: its worst element.
    """

    stage: str
    module: str
    error: float
    before: float
    between: tuple[str, str] | None = None
    worst: Element | None = None

    def __str__(self) -> str:
        name = f"{self.stage}: {self.module or 'its top level'}"
        if self.between:
            name += f", between {self.between[0]} and {self.between[1]}"
        return f"{name} (error jumps from {self.before:.2g} to {self.error:.2g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One comparison.

    Attributes:
        stage: the bundle's stage, or "pipeline". what: which tensor, at which size, step or prompt.
        against: what it was compared with. value None: it could not be measured.
        causes: likely reasons of a failure; those that were tried out say so.
    """

    level: Level
    stage: str
    what: str
    metric: Metric
    value: float | None
    bound: float | None
    verdict: Verdict
    against: str = ""
    reason: str = ""
    detail: str = ""
    culprit: Culprit | None = None
    worst: Element | None = None
    causes: tuple[str, ...] = ()

    @property
    def headroom(self) -> float:
        """How close to its bound: above 1 is broken; for sorting, worst first."""
        if self.verdict is Verdict.NOT_CHECKED:
            return -1.0
        if self.value is None or math.isnan(self.value) or self.bound is None:
            return math.inf
        if self.metric.at_least:
            return self.bound / self.value if self.value > 0 else math.inf
        return self.value / self.bound if self.bound else (math.inf if self.value else 0.0)


def judged(
    level: Level, stage: str, what: str, metric: Metric, value: float, limit: Limit | None, **more: Any
) -> Result:
    """A result whose verdict follows from value and limit; NaN never passes, no limit is "not checked"."""
    if limit is None:
        verdict = Verdict.NOT_CHECKED
    else:
        good = value >= limit.bound if metric.at_least else value <= limit.bound
        verdict = Verdict.PASS if good else Verdict.FAIL
    return Result(
        level=level,
        stage=stage,
        what=what,
        metric=metric,
        value=value,
        verdict=verdict,
        bound=limit.bound if limit else None,
        reason=limit.reason if limit else "",
        **more,
    )


def failed(level: Level, stage: str, what: str, detail: str, **more: Any) -> Result:
    """A failure that is no number: a session that refuses, values that are not finite."""
    return Result(
        level=level,
        stage=stage,
        what=what,
        metric=more.pop("metric", Metric.RELATIVE_L2),
        value=None,
        bound=more.pop("bound", None),
        verdict=Verdict.FAIL,
        detail=detail,
        **more,
    )


def not_checked(level: Level, stage: str, what: str, why: str, **more: Any) -> Result:
    """Something that this machine, or this set of files, cannot show."""
    return Result(
        level=level,
        stage=stage,
        what=what,
        metric=more.pop("metric", Metric.RELATIVE_L2),
        value=more.pop("value", None),
        bound=more.pop("bound", None),
        verdict=Verdict.NOT_CHECKED,
        detail=why,
        **more,
    )


def verdict_of(results: Iterable[Result]) -> Verdict:
    """Fail if anything failed, pass if anything was shown, else not checked."""
    verdicts = {result.verdict for result in results}
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    return Verdict.PASS if Verdict.PASS in verdicts else Verdict.NOT_CHECKED


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleError:
    """One module's error and range, for the table of modules.

    amax is the reference's largest magnitude: what must fit into the deployment dtype. bound: of the error there.
    """

    stage: str
    module: str
    against: str
    error: float
    bound: float
    amax: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepError:
    """The error after one step of one case."""

    case: str
    kind: str
    step: int
    timestep: float
    error: float
    bound: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturePair:
    """Two pictures (H,W,3) of one prompt and seed, floats in [0,1]: their difference is far below 8 bits."""

    case: str
    reference: Any
    candidate: Any
    psnr: float
    ssim: float


@dataclass(slots=True)
class Evidence:
    """What the checks leave for the report besides results."""

    modules: list[ModuleError] = field(default_factory=list)
    steps: list[StepError] = field(default_factory=list)
    pictures: list[PicturePair] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that one run of parity says."""

    results: Sequence[Result]
    evidence: Evidence
    subject: dict[str, Any]
    machine: dict[str, Any]
    tools: dict[str, str]
    seconds: dict[str, float]

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.results)

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.PASS

    def of_level(self, level: Level) -> list[Result]:
        """The level's results, worst first."""
        return sorted((r for r in self.results if r.level is level), key=lambda r: -r.headroom)
