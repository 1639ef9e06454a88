"""Module level: every module by name, our networks beside unmodified upstream's, and the bundle's graphs beside ours.

One picture's real inputs at one step: upstream's latents go into our network too, so that nothing compounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from ditc.export.networks.loading import WeightSource
from ditc.parity.bisect import PlaceError, errors_by_place, find_culprit
from ditc.parity.candidate import fit_feeds
from ditc.parity.cases import CaseRun
from ditc.parity.compare import compare
from ditc.parity.context import Broken, Context
from ditc.parity.feeds import record_feeds
from ditc.parity.reference.pytorch import Twin, TwinSession
from ditc.parity.reference.upstream import Call
from ditc.parity.results import Culprit, ModuleError, Result, Verdict, judged, not_checked
from ditc.parity.trace import Place, TorchTracer, Tracer, tracer_of
from ditc.runtime import step_contract
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.spec import Precision
from ditc.runtime.tolerances import EIGHT, Level, Metric, limit

# What 16 bits cost a tensor that is rounded once: half an ulp. PyTorch may round a place less often than a graph.
ONE_ROUNDING = {Precision.FP16: 2**-11, Precision.BF16: 2**-8, Precision.TF32: 2**-11}
SIMULATED = "PyTorch with the recorded codes"
Feeds = Mapping[str, Array]


def check(context: Context) -> Iterator[Result]:
    """Twin beside upstream, then graph beside twin, stage by stage."""
    case = context.settings.cases[0]
    upstream = context.upstream()
    run = context.twin_run(case)
    step = _plain_step(run)
    calls: dict[str, Call] = {}
    if upstream is not None:
        upstream_run = context.upstream_run(case)
        assert upstream_run is not None
        context.tick("modules, inputs")
        calls = upstream.calls(case, context.settings, run.latents[0], step)
        feeds = record_feeds(context.twin.pipeline, context.settings, upstream_run, step)
    else:
        feeds = record_feeds(context.twin.pipeline, context.settings, run, step)
        yield not_checked(
            Level.MODULE, "all", "modules", context.why_no_upstream, against=context.upstream_name
        )
    for stage, given in feeds.items():
        call = _call_of(context.twin, stage, calls)
        if call is not None:
            yield _against_upstream(context, stage, given, call)
    for stage, given in feeds.items():
        yield _against_twin(context, stage, given)
        context.twin.sessions[stage].close()


def bisect(context: Context, stage: str, feeds: Feeds, output_error: float) -> Culprit | None:
    """The culprit inside one stage of the candidate for one set of inputs, or None where its inside cannot be seen."""
    tracers = None if context.recorded is not None else _tracers(context, stage, feeds)
    if tracers is None:
        context.broken.append(Broken(stage=stage, feeds=feeds, error=output_error, culprit=None))
        return None
    errors = _comparable(context, stage, errors_by_place(*tracers))
    tracers[1].close()
    culprit = find_culprit(stage, errors, _limits(context, stage, feeds), output_error)
    context.broken.append(Broken(stage=stage, feeds=feeds, error=output_error, culprit=culprit))
    return culprit


def _plain_step(run: CaseRun) -> int:
    """The middle step of those with fewest rows: upstream runs the rows of a further guidance in a second call."""
    assert run.start is not None
    rows = [step[step_contract.GUIDANCE_WEIGHTS].shape[1] for step in run.start.schedule]
    plain = [index for index, count in enumerate(rows) if count == min(rows)]
    return min(plain, key=lambda index: abs(index - len(rows) // 2))


def _against_twin(context: Context, stage: str, feeds: Feeds) -> Result:
    context.tick(f"modules of {stage}, graph")
    tracers = _tracers(context, stage, feeds)
    if tracers is None:
        return not_checked(
            Level.MODULE, stage, "modules", "an engine shows no modules", against="PyTorch fp32"
        )
    found = errors_by_place(*tracers, on_chunk=lambda: context.tick(f"modules of {stage}"))
    errors = _comparable(context, stage, found)
    tracers[1].close()
    against = "PyTorch fp32" if reference_of(context, stage) is context.twin.sessions[stage] else SIMULATED
    limits = _limits(context, stage, feeds)
    context.evidence.modules += _evidence(stage, errors, against, limits)
    output_error = _output_error(context, stage, feeds)
    result = _judge(context.candidate.precision(stage), stage, errors, limits, against, output_error)
    if result.verdict is Verdict.FAIL:
        context.broken.append(Broken(stage=stage, feeds=feeds, error=output_error, culprit=result.culprit))
    return result


def _against_upstream(context: Context, stage: str, feeds: Feeds, call: Call) -> Result:
    words = f"modules of {stage}, {context.upstream_name}"
    context.tick(words)
    session = context.twin.sessions[stage]
    prefix, strip = _prefix(context.twin.load(stage).weights), _stripped
    upstream_prefix = "decoder." if stage.startswith("vae") else ""
    theirs = TorchTracer(call.module, call, lambda path: strip(upstream_prefix + path), deltas=True)
    ours = TorchTracer(
        session.module,
        lambda: session.run(feeds),
        lambda path: strip(path.removeprefix(prefix)) if path.startswith(prefix) else None,
    )
    errors = list(errors_by_place(theirs, ours, on_chunk=lambda: context.tick(words)))
    bound = limit(Level.MODULE, Metric.RELATIVE_L2, Precision.FP32)
    assert bound is not None
    errors = [error for error in errors if error.same_form or error.error <= bound.bound]
    output_error = errors[-1].error if errors else 0.0
    return _judge(Precision.FP32, stage, errors, lambda _: bound.bound, context.upstream_name, output_error)


def _judge(
    precision: Precision,
    stage: str,
    errors: list[PlaceError],
    limits: Callable[[PlaceError], float],
    against: str,
    output_error: float,
) -> Result:
    """One result for a stage's modules: the one that comes closest to its bound, or the first that breaks it."""
    bound = limit(Level.MODULE, Metric.RELATIVE_L2, precision, pytorch=0.0)
    outs = [error for error in errors if error.place.kind == "out"]
    if not outs or bound is None:
        why = "no module of the two sides has a name in common" if not outs else "no bound for this precision"
        return not_checked(Level.MODULE, stage, "modules", why, against=against)
    broken = [error for error in errors if not error.error <= limits(error)]
    worst = broken[0] if broken else max(errors, key=lambda e: e.error / limits(e))
    culprit = find_culprit(stage, errors, limits, output_error) if broken else None
    what = f"{len({e.place.module for e in errors})} modules, worst {worst.place}"
    return judged(
        Level.MODULE,
        stage,
        what,
        Metric.RELATIVE_L2,
        worst.error,
        replace(bound, bound=limits(worst)),
        against=against,
        culprit=culprit,
        worst=worst.worst,
    )


def _tracers(context: Context, stage: str, feeds: Feeds) -> tuple[Tracer, Tracer] | None:
    session = context.candidate.sessions.get(stage)
    if session is None:
        return None
    candidate = tracer_of(session, fit_feeds(feeds, session.spec), context.candidate.graph_to_trace(stage))
    if candidate is None:
        return None
    twin = reference_of(context, stage)
    return TorchTracer.of_session(twin, fit_feeds(feeds, twin.spec)), candidate


def reference_of(context: Context, stage: str) -> TwinSession:
    """PyTorch fp32; for 8 bits PyTorch with the recorded codes, which a right graph follows module by module."""
    simulated = context.yardstick_session(stage) if context.candidate.precision(stage) in EIGHT else None
    return simulated or context.twin.sessions[stage]


def _comparable(context: Context, stage: str, errors: Iterable[PlaceError]) -> list[PlaceError]:
    """All places; of an 8-bit graph what leaves modules only: SmoothQuant divides what enters them, on purpose."""
    eight = context.candidate.precision(stage) in EIGHT
    return [error for error in errors if error.place.kind == "out" or not eight]


def _limits(context: Context, stage: str, feeds: Feeds) -> Callable[[PlaceError], float]:
    """The bound at every place: the table's for fp32, below that a multiple of PyTorch's own loss there."""
    precision = context.candidate.precision(stage)
    exact = limit(Level.MODULE, Metric.RELATIVE_L2, Precision.FP32)
    assert exact is not None
    yardstick = context.yardstick_session(stage)
    if yardstick is None:
        return lambda _: exact.bound
    lost = _pytorch_errors(context.twin.sessions[stage], yardstick, feeds)

    def bound(error: PlaceError) -> float:
        found = limit(Level.MODULE, Metric.RELATIVE_L2, precision, pytorch=lost.get(error.place, 0.0))
        return max(found.bound if found else exact.bound, 1.5 * ONE_ROUNDING.get(precision, 0.0))

    return bound


def _pytorch_errors(twin: TwinSession, yardstick: TwinSession, feeds: Feeds) -> dict[Place, float]:
    tracers = (
        TorchTracer.of_session(session, fit_feeds(feeds, session.spec)) for session in (twin, yardstick)
    )
    return {found.place: found.error for found in errors_by_place(*tracers)}


def _output_error(context: Context, stage: str, feeds: Feeds) -> float:
    twin, session = reference_of(context, stage), context.candidate.sessions[stage]
    wanted, got = twin.run(fit_feeds(feeds, twin.spec)), session.run(fit_feeds(feeds, session.spec))
    return max(compare(name, to_numpy(got[name]), to_numpy(wanted[name])).error for name in wanted)


def _evidence(
    stage: str, errors: list[PlaceError], against: str, limits: Callable[[PlaceError], float]
) -> list[ModuleError]:
    return [
        ModuleError(
            stage=stage, module=e.place.module, against=against, error=e.error, bound=limits(e), amax=e.amax
        )
        for e in errors
        if e.place.kind == "out"
    ]


def _call_of(twin: Twin, stage: str, calls: Mapping[str, Call]) -> Call | None:
    components = twin.plan.stages[stage].components
    return calls.get(components[0]) if len(components) == 1 else None


def _prefix(weights: tuple[WeightSource, ...]) -> str:
    """What the twin's module paths have before the checkpoint's."""
    source = weights[0]
    return source.parameter.removesuffix(source.checkpoint)


def _stripped(path: str) -> str:
    """transformers names one network with and without its head's prefix."""
    return path.removeprefix("model.")
