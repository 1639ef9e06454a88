"""The context of a parity run: both sides, the settings, and results that several levels share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ditc.parity.candidate import Candidate
from ditc.parity.cases import Case, CaseRun, SavedReference, Settings, run_case, starting_noise
from ditc.parity.reference import upstream_name, why_no_upstream
from ditc.parity.reference.pytorch import LazyTorchSession, TorchModel
from ditc.parity.reference.upstream import Upstream
from ditc.parity.results import Evidence
from ditc.parity.simulated_quant import simulated_baseline
from ditc.runtime.errors import NumericsError, UsageError
from ditc.runtime.session import Array
from ditc.runtime.spec import CONDITIONER, CONTROLNET, DENOISER, SIXTEEN_BITS, VAE_DECODER, Backend, Precision
from ditc.runtime.tolerances import EIGHT, Level, Limit, Metric, limit

Progress = Callable[[str], None]


@dataclass(kw_only=True)
class Context:
    """One parity run. Every case is drawn once per side, and all levels share the result.

    Attributes:
        reference_or_none: the checkpoint in PyTorch fp32; None where `saved_reference` takes its place.
        saved_reference: reference results from a file.
        eight_bit_budget: relative L2 error allowed for int8 and fp8 at the levels stage, step and trajectory; None
            judges them by the precision baseline.
        with_upstream: whether unmodified upstream, diffusers for most families, is a second reference.
        why_no_edits: why cases that edit a picture are left out, although the bundle has the VAE's encoder.
        loosened: whether the budget has allowed more somewhere than the tolerance table does.
        tick: called with a short description whenever a unit of work is done.
    """

    reference_or_none: TorchModel | None
    candidate: Candidate
    settings: Settings
    with_upstream: bool = True
    saved_reference: SavedReference | None = None
    eight_bit_budget: float | None = None
    why_no_edits: str = ""
    loosened: bool = False
    tick: Progress = lambda text: None
    evidence: Evidence = field(default_factory=Evidence)
    _upstream: Upstream | None = None
    _runs: dict[tuple[str, Case], CaseRun] = field(default_factory=dict)
    _precision_baseline: TorchModel | None = None

    @property
    def reference(self) -> TorchModel:
        """The checkpoint in PyTorch fp32.

        Raises:
            UsageError: the reference is a file.
        """
        if self.reference_or_none is None:
            raise UsageError(
                "this check needs the checkpoint, but the reference is a file",
                hint="give --against CHECKPOINT",
            )
        return self.reference_or_none

    def noise(self, case: Case) -> Array:
        """The starting latents of both sides, (1,C,H,W)."""
        if self.saved_reference is not None:
            return self.saved_reference.runs[case].noise
        return starting_noise(self.reference.pipeline, case, self.settings)

    @property
    def upstream_name(self) -> str:
        """The second reference's name in reports."""
        if self.saved_reference is not None:
            return self.saved_reference.origin.get("upstream", "diffusers")
        return upstream_name(self.reference.checkpoint)

    def name_of_upstream(self, case: Case) -> str:
        """The second reference's name for one case: not every edit of a picture has a pipeline upstream."""
        if self.saved_reference is not None:
            return self.saved_reference.origin.get(f"upstream, {case.edit}", self.upstream_name)
        upstream = self.upstream() if case.edit else None
        return self.upstream_name if upstream is None else upstream.name_of(case.edit)

    @property
    def why_no_upstream(self) -> str:
        """Why there is no second reference; "" if there is one."""
        if not self.with_upstream:
            return f"{self.upstream_name} was left out (--no-diffusers)"
        return "" if self.saved_reference is not None else why_no_upstream(self.reference.checkpoint)

    def upstream(self) -> Upstream | None:
        """Unmodified upstream, loaded on first use; None if it is not available or was left out."""
        if self._upstream is None and self.saved_reference is None and not self.why_no_upstream:
            self.tick(f"loading {self.upstream_name}")
            self._upstream = Upstream(self.reference.original, loras=self.reference.options.loras)
        return self._upstream

    def reference_run(self, case: Case) -> CaseRun:
        """The case drawn by PyTorch fp32."""
        if self.saved_reference is not None:
            return self.saved_reference.runs[case]
        return self._run("PyTorch fp32", case, lambda: self._draw(self.reference, case, "reference"))

    def upstream_run(self, case: Case) -> CaseRun | None:
        """The case drawn by unmodified upstream; None if upstream is not available."""
        if self.saved_reference is not None:
            return self.saved_reference.upstream.get(case)
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
        """The case drawn by the candidate."""
        return self._run("candidate", case, lambda: self._draw_candidate(case))

    def precision_baseline(self) -> TorchModel | None:
        """PyTorch in the precision of the candidate's denoiser, with the plans of all 8-bit stages simulated.

        Its error against fp32 is what the precision itself costs, so the candidate's error is judged by it.

        Returns:
            None if all is fp32, for a saved reference, and for an 8-bit denoiser without a recorded plan.
        """
        if self._precision_baseline is None and self.saved_reference is None:
            precision, plans = self.candidate.precision(DENOISER), self.candidate.plans
            if precision in EIGHT and DENOISER not in plans:
                return None
            options = replace(
                self.reference.options, backend=self._backend(), precision=self._base(precision)
            )
            if plans:
                self._precision_baseline = simulated_baseline(
                    self.reference.checkpoint, options, plans, self.candidate.bases
                )
            elif precision in SIXTEEN_BITS:
                self._precision_baseline = TorchModel(self.reference.checkpoint, options=options)
        return self._precision_baseline

    def _base(self, precision: Precision) -> Precision:
        """The precision outside the denoiser's 8-bit layers. Older bundles do not record it."""
        if precision not in EIGHT:
            return precision
        return self.candidate.bases.get(DENOISER) or self.candidate.precision(CONDITIONER)

    def _backend(self) -> Backend:
        """The backend of the candidate's denoiser, on which the precisions of a build's other stages depend."""
        artifact = self.candidate.artifacts.get(DENOISER)
        return self.reference.options.backend if artifact is None else artifact.backend

    def baseline_session(self, stage: str) -> LazyTorchSession | None:
        """A stage of the precision baseline; None where the candidate's stage has a different precision."""
        baseline, precision = self.precision_baseline(), self.candidate.precision(stage)
        if baseline is None or precision is Precision.FP32:
            return None
        same = stage in self.candidate.plans or precision is baseline.plan.stages[stage].precision
        return baseline.sessions[stage] if same else None

    def baseline_run(self, case: Case) -> CaseRun | None:
        """The case drawn by the precision baseline; None if there is no baseline."""
        baseline = self.precision_baseline()
        if baseline is None:
            return None
        return self._run(
            "baseline", case, lambda: self._draw(baseline, case, f"PyTorch {baseline.precision.value}")
        )

    @property
    def drawing_stage(self) -> str:
        """The stage whose precision decides how far finished latents may be from the reference's."""
        encoders = [spec.stage for spec in self.candidate.manifest.text]
        return next(
            (s for s in (DENOISER, CONTROLNET, *encoders) if self.candidate.precision(s) in EIGHT), DENOISER
        )

    @property
    def pictured_stage(self) -> str:
        """The stage whose precision decides how far pictures may be from the reference's."""
        return VAE_DECODER if self.candidate.precision(VAE_DECODER) in EIGHT else self.drawing_stage

    def bound(
        self,
        level: Level,
        metric: Metric,
        stage: str,
        *,
        pytorch: float | None = None,
        values: float = math.inf,
    ) -> Limit | None:
        """The bound of one comparison at a stage; None where the tolerance table has none for its precision.

        Args:
            pytorch: the precision baseline's error against fp32 on the same input.
            values: on how many values that error was measured.
        """
        precision = self.candidate.precision(stage)
        usual = limit(level, metric, precision, pytorch=pytorch, values=values)
        budget = self.eight_bit_budget
        found = limit(level, metric, precision, pytorch=pytorch, values=values, budget=budget)
        if found is not None and found != usual:
            self.loosened |= usual is None or found.bound > usual.bound
        return found

    def close(self) -> None:
        """Release all weights and the candidate's sessions."""
        for model in (self.reference_or_none, self._precision_baseline):
            if model is not None:
                model.close()
        self.candidate.pipeline.close()

    def _run(self, side: str, case: Case, draw: Callable[[], CaseRun]) -> CaseRun:
        if (side, case) not in self._runs:
            self._runs[side, case] = draw()
        return self._runs[side, case]

    def _draw(self, model: TorchModel, case: Case, side: str) -> CaseRun:
        run = run_case(
            model.pipeline,
            case,
            self.settings,
            self.noise(case),
            on_step=lambda: self.tick(f"{side}, {case}"),
        )
        if run.problem and model is self.reference_or_none:
            raise NumericsError(
                f"the reference itself failed for {case}: {run.problem}",
                hint="parity against it would prove nothing: check the checkpoint",
            )
        return run

    def _draw_candidate(self, case: Case) -> CaseRun:
        return run_case(
            self.candidate.pipeline,
            case,
            self.settings,
            self.noise(case),
            on_step=lambda: self.tick(f"bundle, {case}"),
        )
