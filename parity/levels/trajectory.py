"""Trajectory level, free-running: the whole loop from the same noise, as a user runs it.

All cases run one after the other through the same pipeline, so that any state that one request leaves behind shows
up in the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ditc.parity.cases import Case, CaseRun
from ditc.parity.causes import SAME, edit_causes, explains, feed_causes, frame_causes, kept_causes
from ditc.parity.compare import compare
from ditc.parity.context import Context
from ditc.parity.edits import OF_VIDEOS
from ditc.parity.levels.step import OTHER_TIMESTEP, _feeds
from ditc.parity.results import Culprit, Result, StepError, Verdict, failed, judged, not_checked
from ditc.runtime import step_contract
from ditc.runtime.errors import SessionError
from ditc.runtime.image_states import first_frame_held
from ditc.runtime.metrics import relative_l2
from ditc.runtime.spec import DENOISER, VAE_ENCODER
from ditc.runtime.tolerances import Level, Limit, Metric

OTHER_START = (
    "the loop starts from other latents: the picture is encoded otherwise, or has the noise of another step"
)


def check(context: Context) -> Iterator[Result]:
    """Compare the candidate's latents after the last step with upstream's and with the reference's."""
    for case in context.settings.cases:
        try:
            run = context.candidate_run(case)
        except SessionError as e:
            yield failed(Level.TRAJECTORY, DENOISER, str(case), str(e))
            continue
        baseline = baseline_trajectory_error(context, case)
        upstream = context.upstream_run(case)
        references = (
            (upstream, context.name_of_upstream(case)),
            (context.reference_run(case), "PyTorch fp32"),
        )
        for reference, against in references:
            if reference is not None:
                yield _compared(context, run, reference, against, baseline)
    if context.why_no_edits:
        yield not_checked(Level.TRAJECTORY, VAE_ENCODER, "edits of a picture", context.why_no_edits)


def _compared(
    context: Context, run: CaseRun, reference: CaseRun, against: str, baseline: float | None
) -> Result:
    case = run.case
    bound = context.bound(Level.TRAJECTORY, Metric.RELATIVE_L2, context.drawing_stage, pytorch=baseline)
    errors = _errors(run, reference)
    _keep(context, run, errors, against, bound)
    if run.problem:
        result = failed(Level.TRAJECTORY, DENOISER, str(case), run.problem, against=against)
    elif run.latents.shape != reference.latents.shape:
        problem = f"it took {len(run.latents) - 1} steps, but the reference took {len(reference.latents) - 1}"
        result = failed(Level.TRAJECTORY, "pipeline", str(case), problem, against=against)
    else:
        comparison = compare("latents", run.latents[-1], reference.latents[-1])
        result = judged(
            Level.TRAJECTORY,
            DENOISER,
            f"after {len(errors)} steps, {case}",
            Metric.RELATIVE_L2,
            comparison.error,
            bound,
            worst=comparison.worst,
            against=against,
        )
    if result.verdict is not Verdict.FAIL:
        return result
    return _explained(context, run, errors, result, _causes_of_edit(context, run, reference))


def _causes_of_edit(context: Context, run: CaseRun, reference: CaseRun) -> tuple[str, ...]:
    """Why the case started otherwise from its picture than this reference; () if it starts from none."""
    if run.case.edit is None:
        return ()
    if run.case.edit in OF_VIDEOS:
        return _causes_of_first_frame(context, run, reference)
    causes = edit_causes(len(run.latents) - 1, len(reference.latents) - 1, run.mask, reference.mask)
    kept = None if run.start is None else run.start.kept
    if not causes and kept is not None and reference.mask is not None:
        causes = kept_causes(run.latents[-1], kept.image_latents, reference.mask)
    return causes


def _causes_of_first_frame(context: Context, run: CaseRun, reference: CaseRun) -> tuple[str, ...]:
    """Whether the first frame of a video changes, is another one, or is seen with the timestep of the others."""
    first = first_frame_held(run.latents.shape[1:])
    if causes := frame_causes(run.latents[-1], run.latents[0], first):
        return causes
    if frame_causes(run.latents[-1], reference.latents[-1], first):
        return (OTHER_START,)
    upstream = context.upstream()
    if upstream is None:
        return ()
    mistaken = upstream.draw_with_one_timestep(run.case, context.settings, run.noise)
    return (OTHER_TIMESTEP,) if explains(mistaken, run.latents[-1], reference.latents[-1]) else ()


def _explained(
    context: Context, run: CaseRun, errors: list[float], result: Result, causes: tuple[str, ...]
) -> Result:
    """The failed result with the first step that is wrong, and the causes if it or the first step got wrong inputs."""
    bound = context.bound(Level.STEP, Metric.RELATIVE_L2, DENOISER, pytorch=0.0)
    allowed = bound.bound if bound else 0.0
    first = next((i for i, error in enumerate(errors) if not error <= allowed), len(errors))
    before = errors[first - 1] if first else 0.0
    at = errors[first] if first < len(errors) else float("nan")
    reference = context.reference_run(run.case)
    if not causes and run.start is not None and reference.start is not None:
        causes = feed_causes(_feeds(run.start), _feeds(reference.start), first_step=True)
        if run.case.edit is not None and not relative_l2(run.latents[0], reference.latents[0]) <= SAME:
            causes = (OTHER_START, *causes)
        if not causes and 0 < first < len(run.start.schedule):
            ours, theirs = run.start.schedule, reference.start.schedule
            causes = feed_causes(ours[first], theirs[first], first_step=False, before=ours[first - 1])
    stage = "pipeline" if causes and not _is_step(run, reference) else DENOISER
    culprit = Culprit(stage=stage, module=f"step {first + 1}", error=at, before=before)
    return replace(result, stage=culprit.stage, culprit=culprit, causes=causes)


def _is_step(run: CaseRun, reference: CaseRun) -> bool:
    """Whether a video with a held frame goes wrong in the step itself, which is fed what the reference's is fed."""
    if run.case.edit not in OF_VIDEOS or run.start is None or reference.start is None:
        return False
    fed = feed_causes(_feeds(run.start), _feeds(reference.start), first_step=True)
    return not fed and not relative_l2(run.latents[-1], reference.latents[-1]) <= SAME


def _errors(run: CaseRun, reference: CaseRun) -> list[float]:
    """Relative L2 of the latents after every step that both sides took; NaN where the candidate's are not finite."""
    steps = min(len(run.latents), len(reference.latents))
    return [
        relative_l2(run.latents[i], reference.latents[i])
        if np.isfinite(run.latents[i]).all()
        else float("nan")
        for i in range(1, steps)
    ]


def _keep(context: Context, run: CaseRun, errors: list[float], against: str, bound: Limit | None) -> None:
    assert run.start is not None
    for step, error in enumerate(errors):
        timestep = float(run.start.schedule[step][step_contract.TIMESTEP][0])
        context.evidence.steps.append(
            StepError(
                case=str(run.case),
                kind=f"free-running, {against}",
                step=step,
                timestep=timestep,
                error=error,
                bound=bound.bound if bound else None,
            )
        )


def baseline_trajectory_error(context: Context, case: Case) -> float | None:
    """The relative L2 error of the precision baseline after the whole loop.

    Returns:
        None without a precision baseline, NaN if its run failed.
    """
    if context.saved_reference is not None:
        saved = context.saved_reference.baseline_errors.get(case)
        return saved.trajectory if saved else None
    run = context.baseline_run(case)
    if run is None:
        return None
    return (
        float("nan") if run.problem else relative_l2(run.latents[-1], context.reference_run(case).latents[-1])
    )
