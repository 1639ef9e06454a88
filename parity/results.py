"""What a parity run found: one Result per comparison, gathered in a Report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ditc.runtime.tolerances import Level, Limit, Metric


class Verdict(StrEnum):
    """Not checked is never a pass: the report says so where this machine cannot show something."""

    PASS = "pass"
    FAIL = "fail"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """The element of a tensor in which two sides differ most, and both values."""

    tensor: str
    index: tuple[int, ...]
    candidate: float
    reference: float

    def __str__(self) -> str:
        where = ",".join(map(str, self.index))
        return f"{self.tensor}[{where}] is {self.candidate:.7g}, but the reference has {self.reference:.7g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """Where an error begins.

    Attributes:
        module: PyTorch module path; "" is the top level of the stage.
        error: relative L2 at the first place that differs.
        before: relative L2 at the last place that agreed.
        between: these two places, the last that agreed first, if the error is in the module's own code; None for a
            module without submodules.
        worst: the worst element at the first place that differs.
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
        stage: the bundle's stage, or "pipeline", "scheduler", "tokenizer" or "PyTorch".
        what: which tensor, at which size, step or prompt.
        value: what was measured; None if nothing could be measured.
        bound: what `value` is judged by; None if there is no bound.
        against: what the candidate was compared with.
        reason: why the bound is what it is.
        detail: what is wrong, or why it was not checked.
        causes: likely causes of a failure.
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
    def share_of_bound(self) -> float:
        """How much of its bound the result uses: above 1 breaks it. Results are sorted by this, worst first."""
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
    """A result whose verdict follows from value and limit. NaN never passes; without a limit it is "not checked"."""
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
    """A failure without a measured value: a session refused to run, or values are not finite."""
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
    """A result for something that this machine, or this set of files, cannot show."""
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
    """FAIL if any result failed, else PASS if any passed, else NOT_CHECKED."""
    verdicts = {result.verdict for result in results}
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    return Verdict.PASS if Verdict.PASS in verdicts else Verdict.NOT_CHECKED


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleError:
    """One module's error and range, for the report's table of modules.

    Attributes:
        bound: of `error`, at this module.
        amax: the largest magnitude in the reference, which must fit into the deployment dtype.
    """

    stage: str
    module: str
    against: str
    error: float
    bound: float
    amax: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepError:
    """The error after one step of one case.

    Attributes:
        kind: "teacher-forced" or "free-running", and what it was compared with.
    """

    case: str
    kind: str
    step: int
    timestep: float
    error: float
    bound: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturePair:
    """Two pictures (H,W,3) of one prompt and seed, as floats in [0,1]: in 8 bits their difference would be lost."""

    case: str
    reference: Any
    candidate: Any
    psnr: float
    ssim: float


@dataclass(slots=True)
class Evidence:
    """What the checks hand to the report besides results."""

    modules: list[ModuleError] = field(default_factory=list)
    steps: list[StepError] = field(default_factory=list)
    pictures: list[PicturePair] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that one parity run found.

    Attributes:
        subject: what was compared with what, with hashes.
        seconds: how long each level took.
    """

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
        return sorted((r for r in self.results if r.level is level), key=lambda r: -r.share_of_bound)
