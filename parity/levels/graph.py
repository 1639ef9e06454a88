"""Graph level: facts that can be read without running anything, each true or not.

Weights equal the checkpoint's by name; fp32 islands are fp32; the scheduler's numbers are diffusers' own; texts become
the same token ids.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ditc.export.build.weights import stored_tensor
from ditc.export.graph.passes.islands import check_islands
from ditc.export.quant.layers import linear_layers
from ditc.export.quant.verify import check_scales
from ditc.parity.causes import schedule_causes
from ditc.parity.context import Context
from ditc.parity.results import Culprit, Result, judged, not_checked
from ditc.runtime.errors import BuildError
from ditc.runtime.schedulers import coefficient_table
from ditc.runtime.session import Array
from ditc.runtime.spec import Precision, StageSpec
from ditc.runtime.tolerances import Level, Metric, limit
from ditc.runtime.weight_map import Weight, apply, is_lossless, read_weight_map

EXACT = limit(Level.GRAPH, Metric.COUNT, Precision.FP32)
SHOWN = 3


def check(context: Context) -> Iterator[Result]:
    """All structural checks."""
    for stage in context.candidate.graphs:
        model = context.candidate.graph(stage)
        assert model is not None
        context.tick(f"graph, {stage}")
        yield _check_islands(stage, model, context.twin.plan.stages[stage].spec)
        yield from _check_weights(context, stage, model)
        if stage in context.candidate.plans:
            yield _check_codes(context, stage, model)
    yield _check_schedule(context)
    yield _check_tokens(context)


def _check_islands(stage: str, model: ir.Model, spec: StageSpec) -> Result:
    problem = ""
    try:
        check_islands(model, spec)
    except BuildError as e:
        problem = str(e)
    causes = ("an fp32 island was lowered to 16 bits",) if problem else ()
    return judged(
        Level.GRAPH,
        stage,
        "fp32 islands",
        Metric.COUNT,
        float(bool(problem)),
        EXACT,
        detail=problem,
        causes=causes,
        against="the precision policy",
    )


def _check_weights(context: Context, stage: str, model: ir.Model) -> Iterator[Result]:
    if not context.twin.plan.stages[stage].components:
        return  # a stage without weights
    weights = _weight_map(context, stage)
    if not weights:
        yield not_checked(Level.GRAPH, stage, "weights", "the bundle has no weight map", metric=Metric.COUNT)
        return
    components = [context.twin.checkpoint.component(c) for c in context.twin.plan.stages[stage].components]
    wrong, skipped = [], 0
    for weight in weights:
        value = model.graph.initializers.get(weight.initializer)
        if not is_lossless(weight) or (value is not None and _is_quantized(value)):
            skipped += 1
            continue
        source = next(
            (c.tensors[weight.checkpoint] for c in components if weight.checkpoint in c.tensors), None
        )
        problem = _difference(weight, value, source)
        if problem:
            wrong.append((weight, problem))
    culprit = None
    if wrong:
        first = wrong[0][0].initializer
        culprit = Culprit(stage=stage, module=first.rpartition(".")[0], error=float("nan"), before=0.0)
    names = "; ".join(f"{weight.initializer} {problem}" for weight, problem in wrong[:SHOWN])
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    stale = len(wrong) > len(weights) // 2
    causes = ("most weights differ: a stale artifact, or the checkpoint of another model",) if stale else ()
    note = f" ({skipped} in 8 bits: see codes)" if skipped else ""
    yield judged(
        Level.GRAPH,
        stage,
        f"{len(weights) - skipped} weights{note}",
        Metric.COUNT,
        float(len(wrong)),
        EXACT,
        detail=names + more,
        culprit=culprit,
        causes=causes,
        against="checkpoint",
    )


def _check_codes(context: Context, stage: str, model: ir.Model) -> Result:
    """8-bit weights times their scales are the checkpoint's, and inputs have the scales that calibration gave."""
    plans, problem = context.candidate.plans[stage], ""
    try:
        check_scales(model, plans, linear_layers(context.twin.load(stage)))
    except BuildError as e:
        problem = str(e)
    culprit = None
    if problem:
        culprit = Culprit(stage=stage, module=problem.partition(":")[0], error=float("nan"), before=0.0)
    return judged(
        Level.GRAPH,
        stage,
        f"codes and scales of {len(plans)} layers",
        Metric.COUNT,
        float(bool(problem)),
        EXACT,
        detail=problem,
        culprit=culprit,
        against="checkpoint and recorded plan",
    )


def _weight_map(context: Context, stage: str) -> tuple[Weight, ...]:
    bundle, artifact = context.candidate.bundle, context.candidate.artifacts.get(stage)
    if bundle is None or artifact is None or artifact.weights is None:
        return ()
    return read_weight_map(bundle / artifact.weights.path)


def _is_quantized(value: ir.Value) -> bool:
    dtype = value.dtype or (value.const_value.dtype if value.const_value is not None else None)
    return dtype is not None and not dtype.is_floating_point()


def _difference(weight: Weight, value: ir.Value | None, source: Tensor | None) -> str:
    """What is wrong with one weight; "" if it is the checkpoint's, rounded to the graph's type."""
    if source is None:
        return "is not in the checkpoint"
    if value is None or value.const_value is None:
        return "is not in the graph"
    stored = stored_tensor(value)
    wanted: Tensor = source.to(stored.dtype)
    if wanted.numel() == stored.numel():
        wanted = apply(weight, wanted, stored_shape=tuple(stored.shape))
    if stored.shape != wanted.shape:
        return f"is {tuple(stored.shape)}, the checkpoint has {tuple(wanted.shape)}"
    if torch.equal(stored, wanted):
        return ""
    if not stored.any():
        return "is all zeros"
    if stored.dim() == 2 and stored.shape[0] == stored.shape[1] and torch.equal(stored.T, wanted):
        return "is transposed"
    return f"differs in {int((stored != wanted).sum())} of {stored.numel()} values"


def _check_schedule(context: Context) -> Result:
    """The candidate's schedule beside the checkpoint's own in diffusers, or the twin's where that is left out."""
    steps = context.settings.num_inference_steps
    table = coefficient_table(context.candidate.manifest.scheduler, steps)
    reference = coefficient_table(context.twin.plan.scheduler, steps)
    timesteps, sigmas, against = reference.timesteps, reference.sigmas, "the checkpoint's scheduler_config"
    upstream = context.upstream()
    if upstream is not None:
        scheduler = upstream.pipeline.scheduler
        scheduler.set_timesteps(steps)
        scale = np.float32(context.twin.plan.scheduler.timestep_scale)
        timesteps, sigmas = _host(scheduler.timesteps) * scale, _host(scheduler.sigmas)
        against = f"diffusers {type(scheduler).__name__}"
    wrong = int((~np.isclose(table.timesteps, timesteps, rtol=1e-6)).sum())
    wrong += int((~np.isclose(table.sigmas, sigmas, rtol=1e-6, atol=1e-7)).sum())
    wrong += int(not np.allclose(table.coefficients, reference.coefficients, rtol=1e-5, atol=1e-6))
    return judged(
        Level.GRAPH,
        "scheduler",
        f"{steps} steps",
        Metric.COUNT,
        float(wrong),
        EXACT,
        against=against,
        detail=f"{wrong} timesteps and sigmas differ" if wrong else "",
        causes=schedule_causes(table.sigmas, sigmas) if wrong else (),
    )


def _host(tensor: Tensor) -> Array:
    return tensor.float().cpu().numpy()


def _check_tokens(context: Context) -> Result:
    """Token ids and masks of every prompt and of the empty negative prompt."""
    wrong = []
    pairs = zip(
        context.candidate.pipeline.conditioning.encoders,
        context.twin.pipeline.conditioning.encoders,
        strict=True,
    )
    prompts = [(case.prompt, False) for case in context.settings.cases] + [("", True)]
    for ours, theirs in pairs:
        for text, negative in dict.fromkeys(prompts):
            got = ours.tokenizer.encode([text], ours.spec, negative=negative)
            wanted = theirs.tokenizer.encode([text], theirs.spec, negative=negative)
            same = np.array_equal(got.input_ids, wanted.input_ids) and np.array_equal(
                got.attention_mask, wanted.attention_mask
            )
            if not same or ours.spec.select != theirs.spec.select:
                wrong.append(text)
    return judged(
        Level.GRAPH,
        "tokenizer",
        f"{len(dict.fromkeys(prompts))} texts",
        Metric.COUNT,
        float(len(wrong)),
        EXACT,
        against="the checkpoint's tokenizer",
        detail=f"other token ids for {wrong[0]!r:.60}" if wrong else "",
    )
