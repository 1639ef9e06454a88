"""Module level: compare every module by name, ditc's networks with upstream's, and the bundle's graphs with ditc's.

The inputs are those of one real picture at one step. Upstream's latents go into ditc's network too, so that errors of
earlier steps do not compound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from ditc.export.networks.loading import WeightSource
from ditc.parity.bisect import PlaceError, errors_by_place, find_culprit
from ditc.parity.candidate import fit_feeds
from ditc.parity.cases import CaseRun
from ditc.parity.compare import compare
from ditc.parity.context import Context
from ditc.parity.feeds import record_feeds
from ditc.parity.reference.pytorch import LazyTorchSession, TorchModel
from ditc.parity.reference.upstream import Call
from ditc.parity.results import Culprit, ModuleError, Result, judged, not_checked
from ditc.parity.trace import Place, TorchTracer, Tracer, tracer_of
from ditc.runtime import step_contract
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.spec import VAE_DECODER_NEXT, VAE_ENCODER, Precision
from ditc.runtime.tolerances import EIGHT, Level, Metric, limit

# The error of one rounding to 16 bits: half an ulp. It is the least that a bound allows, because PyTorch may round a
# tensor less often than a graph does.
ONE_ROUNDING = {Precision.FP16: 2**-11, Precision.BF16: 2**-8, Precision.TF32: 2**-11}
SIMULATED = "PyTorch with simulated quantization"
Feeds = Mapping[str, Array]


def check(context: Context) -> Iterator[Result]:
    """Compare the reference with upstream for every stage, then the candidate with the reference."""
    case = context.settings.cases[0]
    upstream = context.upstream()
    run = context.reference_run(case)
    step = _comparable_step(
        run, same_call=context.reference.plan.defaults.perturbed_attention_guidance is not None
    )
    calls: dict[str, Call] = {}
    if upstream is not None:
        upstream_run = context.upstream_run(case)
        assert upstream_run is not None
        context.tick("inputs of the modules")
        calls = upstream.calls(case, context.settings, run.noise, step)
        feeds = record_feeds(context.reference.pipeline, context.settings, upstream_run, step)
    else:
        feeds = record_feeds(context.reference.pipeline, context.settings, run, step)
        yield not_checked(
            Level.MODULE, "all", "modules", context.why_no_upstream, against=context.upstream_name
        )
    for stage, given in feeds.items():
        call = _call_of(context.reference, stage, calls)
        if call is not None:
            yield _against_upstream(context, stage, given, call)
    for stage, given in feeds.items():
        yield _against_pytorch(context, stage, given)
        context.reference.sessions[stage].close()


def bisect(context: Context, stage: str, feeds: Feeds, output_error: float) -> Culprit | None:
    """Find the module of the candidate's stage in which its error begins, for one set of inputs.

    Returns:
        None if the modules cannot be compared: the stage is an engine, or the reference is a file.
    """
    tracers = None if context.saved_reference is not None else _tracers(context, stage, feeds)
    if tracers is None:
        return None
    errors = _comparable(context, stage, errors_by_place(*tracers))
    tracers[1].close()
    return find_culprit(stage, errors, _limits(context, stage, feeds), output_error)


def _comparable_step(run: CaseRun, *, same_call: bool) -> int:
    """The middle one of the steps in which upstream's first call has the same rows.

    Args:
        same_call: whether upstream runs the gated rows in the same call as the others, in every step, as it does for
            perturbed-attention guidance. For skip-layer guidance it makes a second call, which could not be compared.
    """
    assert run.start is not None
    rows = [step[step_contract.GUIDANCE_WEIGHTS].shape[1] for step in run.start.schedule]
    wanted = max(rows) if same_call else min(rows)
    comparable = [index for index, count in enumerate(rows) if count == wanted]
    return min(comparable, key=lambda index: abs(index - len(rows) // 2))


def _against_pytorch(context: Context, stage: str, feeds: Feeds) -> Result:
    context.tick(f"modules of {stage}")
    tracers = _tracers(context, stage, feeds)
    if tracers is None:
        return not_checked(
            Level.MODULE, stage, "modules", "an engine does not show its modules", against="PyTorch fp32"
        )
    found = errors_by_place(*tracers, on_chunk=lambda: context.tick(f"modules of {stage}"))
    errors = _comparable(context, stage, found)
    tracers[1].close()
    against = (
        "PyTorch fp32"
        if reference_session(context, stage) is context.reference.sessions[stage]
        else SIMULATED
    )
    limits = _limits(context, stage, feeds)
    context.evidence.modules += _evidence(stage, errors, against, limits)
    output_error = outputs_error(context, stage, feeds)
    return _judge(context.candidate.precision(stage), stage, errors, limits, against, output_error)


def _against_upstream(context: Context, stage: str, feeds: Feeds, call: Call) -> Result:
    text = f"modules of {stage} in {context.upstream_name}"
    context.tick(text)
    session = context.reference.sessions[stage]
    prefix, strip = _prefix(context.reference.load(stage).weights), _stripped
    upstream_prefix = "decoder." if stage.startswith("vae") else ""
    theirs = TorchTracer(call.module, call, lambda path: strip(upstream_prefix + path), deltas=True)
    ours = TorchTracer(
        session.module,
        lambda: session.run(feeds),
        lambda path: strip(path.removeprefix(prefix)) if path.startswith(prefix) else None,
    )
    errors = list(errors_by_place(theirs, ours, on_chunk=lambda: context.tick(text)))
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
    """One result for all modules of a stage: the first that breaks its bound, else the one closest to its bound."""
    bound = limit(Level.MODULE, Metric.RELATIVE_L2, precision, pytorch=0.0)
    outs = [error for error in errors if error.place.kind == "out"]
    if not outs or bound is None:
        why = "the two sides have no module name in common" if not outs else "this precision has no bound"
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
    reference = reference_session(context, stage)
    return TorchTracer.of_session(reference, fit_feeds(feeds, reference.spec)), candidate


def reference_session(context: Context, stage: str) -> LazyTorchSession:
    """What a stage's modules are compared with: PyTorch fp32, or for 8 bits PyTorch with simulated quantization.

    A correct 8-bit graph equals the simulation module by module, which finds smaller defects than fp32 would.
    """
    simulated = context.baseline_session(stage) if context.candidate.precision(stage) in EIGHT else None
    return simulated or context.reference.sessions[stage]


def _comparable(context: Context, stage: str, errors: Iterable[PlaceError]) -> list[PlaceError]:
    """The places that can be compared: in 8-bit graphs only outputs, because SmoothQuant divides the inputs."""
    eight = context.candidate.precision(stage) in EIGHT
    return [error for error in errors if error.place.kind == "out" or not eight]


def _limits(context: Context, stage: str, feeds: Feeds) -> Callable[[PlaceError], float]:
    """The bound at every place: absolute in fp32, else a multiple of the precision baseline's error at that place."""
    precision = context.candidate.precision(stage)
    exact = limit(Level.MODULE, Metric.RELATIVE_L2, Precision.FP32)
    assert exact is not None
    baseline = context.baseline_session(stage)
    if baseline is None:
        return lambda _: exact.bound
    baseline_errors = _baseline_errors(context.reference.sessions[stage], baseline, feeds)

    def bound(error: PlaceError) -> float:
        found = limit(
            Level.MODULE, Metric.RELATIVE_L2, precision, pytorch=baseline_errors.get(error.place, 0.0)
        )
        return max(found.bound if found else exact.bound, 1.5 * ONE_ROUNDING.get(precision, 0.0))

    return bound


def _baseline_errors(
    reference: LazyTorchSession, baseline: LazyTorchSession, feeds: Feeds
) -> dict[Place, float]:
    tracers = (
        TorchTracer.of_session(session, fit_feeds(feeds, session.spec)) for session in (reference, baseline)
    )
    return {found.place: found.error for found in errors_by_place(*tracers)}


def outputs_error(context: Context, stage: str, feeds: Feeds) -> float:
    """The largest relative L2 error of the candidate's outputs for one set of inputs."""
    reference, session = reference_session(context, stage), context.candidate.sessions[stage]
    wanted, got = reference.run(fit_feeds(feeds, reference.spec)), session.run(fit_feeds(feeds, session.spec))
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


def _call_of(reference: TorchModel, stage: str, calls: Mapping[str, Call]) -> Call | None:
    components = reference.plan.stages[stage].components
    if stage in (VAE_ENCODER, VAE_DECODER_NEXT):  # the call of the VAE is its decoder's, of the first frame
        return None
    return calls.get(components[0]) if components else None


def _prefix(weights: tuple[WeightSource, ...]) -> str:
    """The prefix that ditc's module paths have before those of the checkpoint."""
    source = weights[0]
    return source.parameter.removesuffix(source.checkpoint)


def _stripped(path: str) -> str:
    """The path without "model.", the prefix that transformers gives a network inside a class with a head."""
    return path.removeprefix("model.")
