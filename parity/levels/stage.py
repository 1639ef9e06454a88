"""Stage level: each stage alone, at several shapes and batches with seeded inputs, and with one picture's real ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.parity.candidate import fit_feeds
from ditc.parity.cases import StageCase
from ditc.parity.causes import range_causes
from ditc.parity.compare import Comparison, compare
from ditc.parity.context import Context
from ditc.parity.feeds import record_feeds
from ditc.parity.levels.module import bisect
from ditc.parity.results import Result, Verdict, failed, judged, not_checked
from ditc.runtime import step_contract
from ditc.runtime.errors import SessionError
from ditc.runtime.metrics import relative_l2, widened
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.spec import Precision, StageSpec
from ditc.runtime.tolerances import Level, Limit, Metric


def check(context: Context) -> Iterator[Result]:
    """All cases of all stages that the candidate has."""
    for stage in context.candidate.sessions:
        for case in stage_cases(context, stage):
            context.tick(f"stage {stage}, {case.what}")
            yield check_case(context, case)
            if stage in context.candidate.native:
                yield _check_native(context, case)
        if context.recorded is None:
            context.twin.sessions[stage].close()


def stage_cases(context: Context, stage: str) -> Iterator[StageCase]:
    """Shapes, batches and timesteps that differ, and the real inputs of the first prompt; or those of a file."""
    if context.recorded is not None:
        yield from (case for case in context.recorded.stages if case.stage == stage)
        return
    session = context.twin.sessions[stage]
    integers = context.twin.load(stage).integers
    seen = []
    for index, sizes in enumerate(_sizes(session.spec)):
        if sizes in seen:
            continue
        seen.append(sizes)
        what = " ".join(f"{name} {size}" for name, size in sizes.items())
        feeds = example_feeds(session.spec, sizes, seed=index, integers=integers)
        yield _case(context, stage, what, feeds)
    run = context.twin_run(context.settings.cases[0])
    step = context.settings.num_inference_steps // 2
    real = record_feeds(context.twin.pipeline, context.settings, run, step)
    if stage in real:
        yield _case(context, stage, f"real inputs of step {step}", real[stage])


def check_case(context: Context, case: StageCase) -> Result:
    """One case on the candidate: the output that comes closest to its bound, with the culprit when it breaks it."""
    session = context.candidate.sessions[case.stage]
    try:
        got = {name: to_numpy(t) for name, t in session.run(fit_feeds(case.feeds, session.spec)).items()}
    except SessionError as e:
        return failed(Level.STAGE, case.stage, case.what, str(e), against="PyTorch fp32")
    compared = {
        name: compare(name, got[name], wanted) for name, wanted in judged_outputs(context, case).items()
    }
    results = [
        (_result(context, case, comparison, name), comparison) for name, comparison in compared.items()
    ]
    worst, comparison = max(results, key=lambda pair: pair[0].headroom)
    if worst.verdict is not Verdict.FAIL:
        return worst
    amax = max(float(abs(widened(array)).max()) for array in case.outputs.values())
    culprit = bisect(context, case.stage, case.feeds, comparison.error)
    return replace(worst, culprit=culprit, causes=range_causes(comparison.finite, amax))


def _result(context: Context, case: StageCase, comparison: Comparison, name: str) -> Result:
    what, against = f"{name}, {case.what}", "PyTorch fp32"
    bound = stage_bound(context, case, name)
    if comparison.problem:
        return failed(
            Level.STAGE, case.stage, what, comparison.problem, worst=comparison.worst, against=against
        )
    if bound is None:
        return not_checked(
            Level.STAGE,
            case.stage,
            what,
            _why_unbounded(context, case.stage),
            value=comparison.error,
            against=against,
        )
    return judged(
        Level.STAGE,
        case.stage,
        what,
        Metric.RELATIVE_L2,
        comparison.error,
        bound,
        worst=comparison.worst,
        against=against,
    )


def judged_outputs(context: Context, case: StageCase) -> dict[str, Array]:
    """All outputs; below fp32 without the statistics: one maximum a sample is too few numbers to judge rounding by."""
    exact = context.candidate.precision(case.stage) is Precision.FP32
    return {name: array for name, array in case.outputs.items() if exact or name != step_contract.STATS}


def _check_native(context: Context, case: StageCase) -> Result:
    """The artifact as this machine runs it, wider than promised: a wrong file shows, rounding does not."""
    session = context.candidate.native[case.stage]
    what = f"{case.what}, as it is"
    try:
        got = session.run(fit_feeds(case.feeds, session.spec))
    except SessionError as e:
        return failed(Level.STAGE, case.stage, what, str(e), against="PyTorch fp32")
    for name, wanted in judged_outputs(context, case).items():
        comparison = compare(name, to_numpy(got[name]), wanted)
        bound = stage_bound(context, case, name)
        if comparison.problem or (bound is not None and not comparison.error <= bound.bound):
            detail = comparison.problem or f"{name} differs by {comparison.error:.2e}"
            return failed(
                Level.STAGE, case.stage, what, detail, worst=comparison.worst, against="PyTorch fp32"
            )
    why = f"{session.device.name} computes 16 bits in fp32: the graph is right, its rounding is not shown"
    return not_checked(Level.STAGE, case.stage, what, why, against="PyTorch fp32")


def stage_bound(context: Context, case: StageCase, name: str) -> Limit | None:
    """How far an output may be off in this case; None where nobody has said."""
    lost = case.pytorch.get(name) if case.pytorch is not None else None
    return context.bound(Level.STAGE, Metric.RELATIVE_L2, case.stage, pytorch=lost)


def _why_unbounded(context: Context, stage: str) -> str:
    precision = context.candidate.precision(stage)
    if precision in (Precision.INT8, Precision.FP8):
        return f"no plan is recorded for {precision.value}: build the bundle again, or give --budget X"
    return f"PyTorch itself gives NaN or Inf in {precision.value} here, so there is nothing to measure by"


def _case(context: Context, stage: str, what: str, feeds: dict[str, Array]) -> StageCase:
    twin = context.twin.sessions[stage]
    precision = context.candidate.precision(stage)
    if precision is not Precision.FP32:
        feeds = _representable(feeds, context, stage)
    outputs = {name: to_numpy(t) for name, t in twin.run(fit_feeds(feeds, twin.spec)).items()}
    pytorch = None
    other = context.yardstick_session(stage)
    if other is not None:
        low = other.run(fit_feeds(feeds, other.spec))
        pytorch = {
            n: relative_l2(widened(to_numpy(low[n])), widened(wanted)) for n, wanted in outputs.items()
        }
    return StageCase(stage, what, feeds, outputs, pytorch)


def _representable(feeds: dict[str, Array], context: Context, stage: str) -> dict[str, Array]:
    """Feeds that the candidate's input types hold exactly: rounding an input is not the stage's error."""
    spec = context.candidate.sessions[stage].spec
    return {name: widened(array) for name, array in fit_feeds(feeds, spec).items()}


def _sizes(spec: StageSpec) -> Iterator[dict[str, int]]:
    """The likely sizes, different ones, and the smallest."""
    yield example_sizes(spec)
    yield example_sizes(spec, second=True)
    smallest = {name: max(bounds.min, bounds.multiple_of) for name, bounds in spec.profile.items()}
    rows, batch = step_contract.ROWS, step_contract.BATCH
    if rows in smallest and batch in smallest:
        smallest[rows] = max(smallest[rows], smallest[batch])
    yield smallest
