"""What every level works with: both sides, the settings, and what one level computed and the next can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ditc.parity.candidate import Candidate
from ditc.parity.cases import Case, CaseRun, Settings, run_case, starting_noise
from ditc.parity.results import Evidence
from ditc.parity.twin import Twin
from ditc.parity.upstream import Upstream
from ditc.runtime.errors import NumericsError
from ditc.runtime.session import Array
from ditc.runtime.spec import DENOISER, Precision

Progress = Callable[[str], None]


@dataclass(kw_only=True)
class Context:
    """One parity run. Reference runs are drawn once and shared by all levels.

    Attributes:
        with_upstream: whether unmodified diffusers is a second reference.
        tick: called with a few words whenever a unit of work is done.
    """

    twin: Twin
    candidate: Candidate
    settings: Settings
    with_upstream: bool = True
    tick: Progress = lambda words: None
    evidence: Evidence = field(default_factory=Evidence)
    _upstream: Upstream | None = None
    _runs: dict[tuple[str, Case], CaseRun] = field(default_factory=dict)
    _yardstick: Twin | None = None

    def noise(self, case: Case) -> Array:
        """The starting latents of both sides."""
        return starting_noise(self.twin.pipeline, case, self.settings)

    def upstream(self) -> Upstream | None:
        """Unmodified diffusers, loaded on first use."""
        if self._upstream is None and self.with_upstream:
            self.tick("loading diffusers")
            self._upstream = Upstream(self.twin.checkpoint)
        return self._upstream

    def twin_run(self, case: Case) -> CaseRun:
        """The case in PyTorch fp32."""
        return self._run("PyTorch fp32", case, lambda: self._drawn(self.twin, case, "reference"))

    def upstream_run(self, case: Case) -> CaseRun | None:
        """The case in diffusers, or None without it."""
        upstream = self.upstream()
        if upstream is None:
            return None
        return self._run(
            "diffusers",
            case,
            lambda: upstream.draw(
                case, self.settings, self.noise(case), on_step=lambda: self.tick(f"diffusers, {case}")
            ),
        )

    def candidate_run(self, case: Case) -> CaseRun:
        """The case in the candidate."""
        return self._run("candidate", case, lambda: self._candidate(case))

    def yardstick(self) -> Twin | None:
        """PyTorch in the candidate's precision: what that precision costs by itself. None for fp32 and 8 bits."""
        precision = self.candidate.precision(DENOISER)
        if precision not in (Precision.FP16, Precision.BF16):
            return None
        if self._yardstick is None:
            self._yardstick = Twin(self.twin.checkpoint, precision=precision, like=self.candidate.manifest)
        return self._yardstick

    def yardstick_run(self, case: Case) -> CaseRun | None:
        """The case in PyTorch in the candidate's precision."""
        twin = self.yardstick()
        if twin is None:
            return None
        return self._run(
            "yardstick", case, lambda: self._drawn(twin, case, f"PyTorch {twin.precision.value}")
        )

    def budget(self, stage: str) -> float | None:
        """The error that the calibration allowed an 8-bit stage; None where the bundle records none."""
        artifact = self.candidate.artifacts.get(stage)
        budget: float | None = getattr(artifact, "error_budget", None)
        return budget

    def close(self) -> None:
        """Let all weights go."""
        for twin in (self.twin, self._yardstick):
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
        if run.problem and twin is self.twin:
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
