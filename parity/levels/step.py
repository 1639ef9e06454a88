"""Step level, teacher-forced: every step starts from the reference's latents, so that errors do not compound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ditc.parity.candidate import fit_feeds
from ditc.parity.cases import Case, CaseRun, forced_state, start_case
from ditc.parity.causes import (
    SAME,
    edit_causes,
    explains,
    feed_causes,
    frame_causes,
    kept_causes,
    range_causes,
)
from ditc.parity.compare import Comparison, compare
from ditc.parity.context import Context
from ditc.parity.feeds import Recorder
from ditc.parity.levels.module import bisect, outputs_error
from ditc.parity.results import Culprit, Result, StepError, Verdict, failed, judged
from ditc.runtime import denoise, step_contract
from ditc.runtime.control import step_session
from ditc.runtime.errors import SessionError
from ditc.runtime.metrics import relative_l2
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.spec import CONTROLNET, DENOISER
from ditc.runtime.state import DenoiseState
from ditc.runtime.tolerances import Level, Metric

AGAINST = "PyTorch fp32"
OTHER_TIMESTEP = (
    "the timestep of the first frame is not 0: the network sees the held frame with that of the others"
)


def check(context: Context) -> Iterator[Result]:
    """Check every step of every case. There is one result per case: its first step that fails, else its worst step."""
    for case in context.settings.cases:
        yield _check_case(context, case)


def _check_case(context: Context, case: Case) -> Result:
    run = context.reference_run(case)
    assert run.start is not None
    _, start = start_case(context.candidate.pipeline, case, context.settings, run.noise)
    if case.edit is not None:
        mask = None if start.kept is None else start.kept.mask
        causes = edit_causes(len(start.schedule), len(run.start.schedule), mask, run.mask)
        if causes:
            culprit = Culprit(stage="pipeline", module="what the loop starts from", error=np.inf, before=0.0)
            return failed(
                Level.STEP,
                "pipeline",
                str(case),
                causes[0],
                against=AGAINST,
                culprit=culprit,
                causes=causes,
            )
    baseline = baseline_step_errors(context, case, run)
    worst: Result | None = None
    for step in range(len(run.start.schedule)):
        context.tick(f"step {step + 1}, {case}")
        result = _check_step(context, case, run, start, step, baseline[step] if baseline else None)
        if worst is None or result.share_of_bound > worst.share_of_bound:
            worst = result
        if result.verdict is Verdict.FAIL:
            break
    assert worst is not None
    return worst


def _check_step(
    context: Context, case: Case, run: CaseRun, start: DenoiseState, step: int, baseline: float | None
) -> Result:
    what = f"step {step + 1} of {len(start.schedule)}, {case}"
    try:
        comparison, after = _compared_step(context, run, start, step)
    except (SessionError, IndexError) as e:
        return failed(Level.STEP, DENOISER, what, str(e), against=AGAINST)
    bound = context.bound(Level.STEP, Metric.RELATIVE_L2, context.drawing_stage, pytorch=baseline)
    timestep = float(start.schedule[step][step_contract.TIMESTEP][0])
    context.evidence.steps.append(
        StepError(
            case=str(case),
            kind="teacher-forced",
            step=step,
            timestep=timestep,
            error=comparison.error,
            bound=bound.bound if bound else None,
        )
    )
    if comparison.problem:
        result = failed(
            Level.STEP, DENOISER, what, comparison.problem, worst=comparison.worst, against=AGAINST
        )
    else:
        result = judged(
            Level.STEP,
            DENOISER,
            what,
            Metric.RELATIVE_L2,
            comparison.error,
            bound,
            worst=comparison.worst,
            against=AGAINST,
        )
    return (
        _explained(context, run, start, after, result, comparison)
        if result.verdict is Verdict.FAIL
        else result
    )


def _compared_step(
    context: Context, run: CaseRun, start: DenoiseState, step: int
) -> tuple[Comparison, DenoiseState]:
    """Run the candidate's step from the reference's latents. Return the worse comparison, of next latents or of x0."""
    assert run.x0 is not None
    state = forced_state(run, start, step)
    (after,) = denoise.step(step_session(context.candidate.sessions), [state])
    assert after.x0 is not None
    pairs = (
        compare("next_latents", to_numpy(after.latents), run.latents[step + 1]),
        compare("x0", to_numpy(after.x0), run.x0[step]),
    )
    return max(pairs, key=lambda c: np.inf if c.error != c.error else c.error), after


def _explained(
    context: Context,
    run: CaseRun,
    start: DenoiseState,
    after: DenoiseState,
    result: Result,
    comparison: Comparison,
) -> Result:
    """The failed result with its culprit and causes.

    If the two pipelines feed the denoiser different values, or put back other latents after it, the candidate's
    pipeline is wrong. If not, the denoiser itself is wrong, and its modules are compared on the reference's feeds.

    Args:
        start, after: the candidate's states before the first step and after this one.
    """
    assert run.start is not None and run.x0 is not None and after.x0 is not None
    step = after.step_index - 1
    fed = _feeds(forced_state(run, start, step))
    wanted = _feeds(forced_state(run, run.start, step))
    before = start.schedule[step - 1] if step else None
    causes = feed_causes(fed, wanted, first_step=step == 0, before=before)
    error = comparison.error
    if causes:
        culprit = Culprit(stage="pipeline", module="what the denoiser is fed", error=error, before=0.0)
        return replace(result, stage="pipeline", culprit=culprit, causes=causes)
    if start.kept is not None and relative_l2(to_numpy(after.x0), run.x0[step]) <= SAME:
        culprit = Culprit(
            stage="pipeline", module="what inpainting puts back after the step", error=error, before=0.0
        )
        kept, last = start.kept, step == len(start.schedule) - 1
        signal, level = (1.0, 0.0) if last else kept.levels[step + 1]
        picture = signal * kept.image_latents + level * kept.noise
        causes = kept_causes(to_numpy(after.latents), picture, kept.mask)
        return replace(result, stage="pipeline", culprit=culprit, causes=causes)
    expected = {step_contract.NEXT_LATENTS: run.latents[step + 1], step_contract.X0: run.x0[step]}
    inside = _inside(context, wanted, expected, error)
    amax = float(np.abs(run.latents).max())
    causes = range_causes(comparison.finite, amax) or _causes_of_held_frames(
        context, wanted, after, run.x0[step]
    )
    return replace(result, culprit=inside, causes=causes)


def _inside(
    context: Context, feeds: dict[str, Array], expected: dict[str, Array], error: float
) -> Culprit | None:
    """The module in which a step's error begins.

    With a ControlNet, it is one of the stage that causes most of the error: of the ControlNet, if the candidate's
    denoiser makes less than half of the error with the residuals that the reference's ControlNet computes.

    Args:
        feeds: of the step, as the reference's pipeline feeds it.
        expected: what the reference computes from them, by output.
        error: the candidate's, against `expected`.
    """
    if context.saved_reference is not None or CONTROLNET not in context.candidate.sessions:
        return bisect(context, DENOISER, feeds, error)
    sessions, denoiser = context.reference.sessions, context.candidate.sessions[DENOISER]
    recorder = Recorder(sessions[DENOISER])
    step_session({**sessions, DENOISER: recorder}).run(feeds)
    assert recorder.feeds is not None
    got = denoiser.run(fit_feeds(recorder.feeds, denoiser.spec))
    alone = max(relative_l2(to_numpy(got[name]), wanted) for name, wanted in expected.items())
    if np.isfinite(alone) and not alone > error / 2:
        return bisect(context, CONTROLNET, feeds, outputs_error(context, CONTROLNET, feeds))
    return bisect(context, DENOISER, recorder.feeds, error)


def _causes_of_held_frames(
    context: Context, feeds: dict[str, Array], after: DenoiseState, expected_x0: Array
) -> tuple[str, ...]:
    """Whether the step changes frames that are held, and whether its network sees them with the others' timestep.

    Args:
        feeds: what the step was fed.
        expected_x0: what the reference computes from it.
    """
    held = feeds.get(step_contract.HELD)
    if held is None or not held.any() or after.x0 is None:
        return ()
    causes = frame_causes(to_numpy(after.latents), feeds[step_contract.LATENTS], held)
    if context.saved_reference is not None:
        return causes
    session = context.reference.sessions[DENOISER]
    mistaken = session.run({**feeds, step_contract.HELD: np.zeros_like(held)})[step_contract.X0]
    others = np.broadcast_to(held[:, None, :, None, None] < 0.5, expected_x0.shape)
    got, mistaken = to_numpy(after.x0)[others], to_numpy(mistaken)[others]
    if explains(mistaken, got, expected_x0[others]):
        causes = (*causes, OTHER_TIMESTEP)
    return causes


def _feeds(state: DenoiseState) -> dict[str, Array]:
    return {name: to_numpy(tensor) for name, tensor in state.feeds().items()}


def baseline_step_errors(context: Context, case: Case, run: CaseRun) -> list[float] | None:
    """Relative L2 errors of the precision baseline's steps from the reference's latents; None without a baseline."""
    if context.saved_reference is not None:
        saved = context.saved_reference.baseline_errors.get(case)
        return saved.steps if saved else None
    baseline = context.precision_baseline()
    if baseline is None:
        return None
    _, start = start_case(baseline.pipeline, case, context.settings, run.noise)
    errors = []
    for step in range(len(start.schedule)):
        (after,) = denoise.step(step_session(baseline.sessions), [forced_state(run, start, step)])
        assert after.x0 is not None and run.x0 is not None
        pairs = ((after.latents, run.latents[step + 1]), (after.x0, run.x0[step]))
        errors.append(max(relative_l2(to_numpy(got), wanted) for got, wanted in pairs))
        context.tick(f"PyTorch {baseline.precision.value}, step {step + 1}, {case}")
    return errors
