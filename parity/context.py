"""What every level works with: both sides, the settings, and what one level computed and the next can use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ditc.parity.candidate import Candidate
from ditc.parity.cases import Case, CaseRun, Recorded, Settings, run_case, starting_noise
from ditc.parity.reference import upstream_name, why_no_upstream
from ditc.parity.reference.pytorch import Twin, TwinSession
from ditc.parity.reference.upstream import Upstream
from ditc.parity.results import Culprit, Evidence
from ditc.parity.simulated_quant import simulated_twin
from ditc.runtime.errors import NumericsError, UsageError
from ditc.runtime.session import Array
from ditc.runtime.spec import CONDITIONER, DENOISER, Precision
from ditc.runtime.tolerances import EIGHT, Level, Limit, Metric, limit

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A stage that failed, on which feeds, by how much, and where its error begins if that is known."""

    stage: str
    feeds: Mapping[str, Array]
    error: float
    culprit: Culprit | None


@dataclass(kw_only=True)
class Context:
    """One parity run. Reference runs are drawn once and shared by all levels.

    Attributes:
        twin_or_none: the checkpoint; None where its results come from a file.
        recorded: results of another machine, from a file.
        eight_bit_budget: relative L2 that int8 and fp8 stages may have, instead of
            what the recorded plan costs.
        with_upstream: whether unmodified upstream, diffusers for most families, is a second reference.
        broken: stages that failed so far, first first.
        tick: called with a few words whenever a unit of work is done.
    """

    twin_or_none: Twin | None
    candidate: Candidate
    settings: Settings
    with_upstream: bool = True
    recorded: Recorded | None = None
    eight_bit_budget: float | None = None
    tick: Progress = lambda words: None
    evidence: Evidence = field(default_factory=Evidence)
    broken: list[Broken] = field(default_factory=list)
    _upstream: Upstream | None = None
    _runs: dict[tuple[str, Case], CaseRun] = field(default_factory=dict)
    _yardstick: Twin | None = None

    @property
    def twin(self) -> Twin:
        """The checkpoint in PyTorch fp32.

        Raises:
            UsageError: there is none: the reference is a file.
        """
        if self.twin_or_none is None:
            raise UsageError("this needs the checkpoint itself", hint="give --against CHECKPOINT")
        return self.twin_or_none

    def noise(self, case: Case) -> Array:
        """The starting latents of both sides."""
        if self.recorded is not None:
            return self.recorded.runs[case].latents[0]
        return starting_noise(self.twin.pipeline, case, self.settings)

    @property
    def upstream_name(self) -> str:
        """What the second reference is called."""
        if self.recorded is not None:
            return self.recorded.origin.get("upstream", "diffusers")
        return upstream_name(self.twin.checkpoint)

    @property
    def why_no_upstream(self) -> str:
        """Why there is no second reference; "" where there is one."""
        if not self.with_upstream:
            return f"{self.upstream_name} was left out"
        return "" if self.recorded is not None else why_no_upstream(self.twin.checkpoint)

    def upstream(self) -> Upstream | None:
        """Unmodified upstream, loaded on first use."""
        if self._upstream is None and self.recorded is None and not self.why_no_upstream:
            self.tick(f"loading {self.upstream_name}")
            self._upstream = Upstream(self.twin.checkpoint)
        return self._upstream

    def twin_run(self, case: Case) -> CaseRun:
        """The case in PyTorch fp32."""
        if self.recorded is not None:
            return self.recorded.runs[case]
        return self._run("PyTorch fp32", case, lambda: self._drawn(self.twin, case, "reference"))

    def upstream_run(self, case: Case) -> CaseRun | None:
        """The case in unmodified upstream, or None without it."""
        if self.recorded is not None:
            return self.recorded.upstream.get(case)
        upstream = self.upstream()
        if upstream is None:
            return None
        return self._run(
            self.upstream_name,
            case,
            lambda: upstream.draw(
                case,
                self.settings,
                self.noise(case),
                on_step=lambda: self.tick(f"{self.upstream_name}, {case}"),
            ),
        )

    def candidate_run(self, case: Case) -> CaseRun:
        """The case in the candidate."""
        return self._run("candidate", case, lambda: self._candidate(case))

    def yardstick(self) -> Twin | None:
        """PyTorch as the candidate's denoiser computes: in 16 bits, or by the plan of its 8 bits.

        What that precision costs by itself. None for fp32, and for 8 bits without a record of the plan.
        """
        if self._yardstick is None and self.recorded is None:
            precision, plans = self.candidate.precision(DENOISER), self.candidate.plans.get(DENOISER)
            if precision in (Precision.FP16, Precision.BF16):
                options = replace(self.twin.options, precision=precision)
                self._yardstick = Twin(self.twin.checkpoint, options=options)
            elif precision in EIGHT and plans:
                self._yardstick = simulated_twin(self.twin, plans, self.candidate.precision(CONDITIONER))
        return self._yardstick

    def yardstick_session(self, stage: str) -> TwinSession | None:
        """The yardstick's stage, where it stands for the candidate's precision there."""
        twin, precision = self.yardstick(), self.candidate.precision(stage)
        if twin is None or precision is Precision.FP32:
            return None
        same = precision in EIGHT or precision is twin.plan.stages[stage].precision
        return twin.sessions[stage] if same else None

    def yardstick_run(self, case: Case) -> CaseRun | None:
        """The case in PyTorch in the candidate's precision."""
        twin = self.yardstick()
        if twin is None:
            return None
        return self._run(
            "yardstick", case, lambda: self._drawn(twin, case, f"PyTorch {twin.precision.value}")
        )

    def bound(
        self, level: Level, metric: Metric, stage: str, *, pytorch: float | None = None
    ) -> Limit | None:
        """The bound of one comparison at a stage, by its precision; None where nobody has said.

        Args:
            pytorch: what PyTorch itself loses in that precision, on the same input.
        """
        precision = self.candidate.precision(stage)
        return limit(level, metric, precision, pytorch=pytorch, budget=self.eight_bit_budget)

    def close(self) -> None:
        """Let all weights go."""
        for twin in (self.twin_or_none, self._yardstick):
            if twin is not None:
                twin.close()
        self.candidate.pipeline.close()

    def _run(self, side: str, case: Case, draw: Callable[[], CaseRun]) -> CaseRun:
        if (side, case) not in self._runs:
            self._runs[side, case] = draw()
        return self._runs[side, case]

    def _drawn(self, twin: Twin, case: Case, side: str) -> CaseRun:
        run = run_case(
            twin.pipeline, case, self.settings, self.noise(case), on_step=lambda: self.tick(f"{side}, {case}")
        )
        if run.problem and twin is self.twin_or_none:
            raise NumericsError(
                f"the reference itself broke for {case}: {run.problem}",
                hint="parity against it would prove nothing: check the checkpoint",
            )
        return run

    def _candidate(self, case: Case) -> CaseRun:
        return run_case(
            self.candidate.pipeline,
            case,
            self.settings,
            self.noise(case),
            on_step=lambda: self.tick(f"bundle, {case}"),
        )
