"""Stage level: each stage alone, with seeded inputs of several shapes and batches, and with one picture's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.parity import tokens
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
from ditc.runtime.spec import EIGHT_BITS, VAE_ENCODER, Precision, StageSpec
from ditc.runtime.tolerances import Level, Limit, Metric


def check(context: Context) -> Iterator[Result]:
    """Check every case of every stage that the candidate has, and that different texts are encoded differently."""
    for stage in context.candidate.sessions:
        for case in stage_cases(context, stage):
            context.tick(f"stage {stage}, {case.what}")
            yield check_case(context, case)
            if stage in context.candidate.native:
                yield _check_native(context, case)
        if context.saved_reference is None:
            context.reference.sessions[stage].close()
    yield from tokens.check_states(context)


def stage_cases(context: Context, stage: str) -> Iterator[StageCase]:
    """The cases of one stage: seeded inputs of several sizes, then the real inputs of the first case.

    With a saved reference, the cases are those of the file.
    """
    if context.saved_reference is not None:
        yield from (case for case in context.saved_reference.stages if case.stage == stage)
        return
    session = context.reference.sessions[stage]
    integers = context.reference.load(stage).integers
    seen = []
    for index, sizes in enumerate(_sizes(session.spec)):
        if sizes in seen:
            continue
        seen.append(sizes)
        what = " ".join(f"{name} {size}" for name, size in sizes.items())
        feeds = example_feeds(session.spec, sizes, seed=index, integers=integers)
        yield _case(context, stage, what, feeds)
    cases, step = context.settings.cases, context.settings.num_inference_steps // 2
    what, drawn = f"real inputs of step {step}", cases[0]
    if stage == VAE_ENCODER:  # most cases draw from noise and do not run it
        what, step, drawn = "the example picture", 0, next((case for case in cases if case.edit), drawn)
    run = context.reference_run(drawn)
    real = record_feeds(context.reference.pipeline, context.settings, run, step)
    if stage in real:
        yield _case(context, stage, what, real[stage])


def check_case(context: Context, case: StageCase) -> Result:
    """Run one case on the candidate. The result is for the output closest to its bound; a failure names the culprit."""
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
    worst, comparison = max(results, key=lambda pair: pair[0].share_of_bound)
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
    """The outputs to compare. The statistics count only in fp32: one maximum per sample cannot judge rounding."""
    exact = context.candidate.precision(case.stage) is Precision.FP32
    return {name: array for name, array in case.outputs.items() if exact or name != step_contract.STATS}


def _check_native(context: Context, case: StageCase) -> Result:
    """Check the artifact as this machine runs it, in a wider type than its own.

    This shows a wrong file, but not the rounding, so the best verdict is "not checked".
    """
    session = context.candidate.native[case.stage]
    what = f"{case.what}, the file as it is"
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
    why = f"{session.device.name} computes 16 bits in fp32: the graph is right, but its rounding was not checked"
    return not_checked(Level.STAGE, case.stage, what, why, against="PyTorch fp32")


def stage_bound(context: Context, case: StageCase, name: str) -> Limit | None:
    """The bound of one output in this case; None if there is no bound."""
    baseline = case.baseline_errors.get(name) if case.baseline_errors is not None else None
    values = case.outputs[name].size
    return context.bound(Level.STAGE, Metric.RELATIVE_L2, case.stage, pytorch=baseline, values=values)


def _why_unbounded(context: Context, stage: str) -> str:
    precision = context.candidate.precision(stage)
    if precision in EIGHT_BITS:
        return f"the bundle records no {precision.value} plan: build it again, or give --budget X"
    return f"PyTorch itself gives NaN or Inf in {precision.value} on these inputs, so there is no bound"


def _case(context: Context, stage: str, what: str, feeds: dict[str, Array]) -> StageCase:
    reference = context.reference.sessions[stage]
    if context.candidate.precision(stage) is not Precision.FP32:
        feeds = _representable(feeds, context, stage)
    outputs = {name: to_numpy(t) for name, t in reference.run(fit_feeds(feeds, reference.spec)).items()}
    errors = None
    baseline = context.baseline_session(stage)
    if baseline is not None:
        got = baseline.run(fit_feeds(feeds, baseline.spec))
        errors = {n: relative_l2(widened(to_numpy(got[n])), widened(wanted)) for n, wanted in outputs.items()}
    return StageCase(stage, what, feeds, outputs, baseline_errors=errors)


def _representable(feeds: dict[str, Array], context: Context, stage: str) -> dict[str, Array]:
    """The feeds rounded to the candidate's input types for both sides: rounding an input is not the stage's error."""
    spec = context.candidate.sessions[stage].spec
    return {name: widened(array) for name, array in fit_feeds(feeds, spec).items()}


def _sizes(spec: StageSpec) -> Iterator[dict[str, int]]:
    """Yield the usual sizes, a second set of sizes, and the smallest sizes."""
    yield example_sizes(spec)
    yield example_sizes(spec, second=True)
    smallest = {name: max(bounds.min, bounds.multiple_of) for name, bounds in spec.profile.items()}
    rows, batch = step_contract.ROWS, step_contract.BATCH
    if rows in smallest and batch in smallest:
        smallest[rows] = max(smallest[rows], smallest[batch])
    yield smallest
