"""Graph level: facts that are checked without running a network.

The weights equal the checkpoint's by name, the fp32 islands are in fp32, the scheduler's numbers equal diffusers', and
texts become the same token ids. Only OpenVINO runs here: it says afterwards in which types it has computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ditc.export.build.weights import stored_tensor
from ditc.export.graph.passes.islands import check_islands
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.verify import check_scales
from ditc.parity import tokens
from ditc.parity.causes import schedule_causes
from ditc.parity.context import Context
from ditc.parity.folded_loras import change_cause, rounds_alike
from ditc.parity.levels import executed
from ditc.parity.results import Culprit, Result, judged, not_checked
from ditc.runtime.errors import BuildError
from ditc.runtime.schedulers import SchedulerKind, SchedulerParams, coefficient_table, dynamic_mu
from ditc.runtime.session import Array
from ditc.runtime.spec import Precision, StageSpec
from ditc.runtime.tolerances import Level, Metric, limit
from ditc.runtime.weight_map import Weight, apply, is_lossless, read_weight_map

EXACT = limit(Level.GRAPH, Metric.COUNT, Precision.FP32)
SHOWN = 3  # wrong weights that are named in a result


def check(context: Context) -> Iterator[Result]:
    """Check every graph of the candidate, then its scheduler and its tokenizers."""
    for stage in context.candidate.graphs:
        model = context.candidate.graph(stage)
        assert model is not None
        context.tick(f"graph, {stage}")
        yield _check_islands(stage, model, context.reference.plan.stages[stage].spec)
        yield from _check_weights(context, stage, model)
        if stage in context.candidate.plans:
            yield _check_quantized_values(context, stage, model)
    yield from executed.check(context)
    yield _check_schedule(context)
    yield from tokens.check(context)


def _check_islands(stage: str, model: ir.Model, spec: StageSpec) -> Result:
    problem = ""
    try:
        check_islands(model, spec)
    except BuildError as e:
        problem = str(e)
    causes = ("an fp32 island was narrowed to 16 bits",) if problem else ()
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
    if not context.reference.plan.stages[stage].components:
        return  # the stage has no weights
    weights = _weight_map(context, stage)
    if not weights:
        yield not_checked(Level.GRAPH, stage, "weights", "the bundle has no weight map", metric=Metric.COUNT)
        return
    reference = context.reference
    # LoRAs that are inputs of the graph are not in its weights.
    checkpoint = reference.original if context.candidate.given else reference.checkpoint
    components = [checkpoint.component(name) for name in reference.plan.stages[stage].components]
    changes = {} if context.candidate.given else lora_changed(context, stage)
    wrong, causes, skipped = [], [], 0
    for weight in weights:
        value = model.graph.initializers.get(weight.initializer)
        if not is_lossless(weight) or (value is not None and _is_quantized(value)):
            skipped += 1
            continue
        source = next(
            (c.tensors[weight.checkpoint] for c in components if weight.checkpoint in c.tensors), None
        )
        plain = changes.get(weight.checkpoint)
        problem = _difference(weight, value, source, lora=plain is not None)
        if problem:
            wrong.append((weight, problem))
            causes += [] if plain is None else _lora_causes(weight, value, source, plain)
    culprit = None
    if wrong:
        first = wrong[0][0].initializer
        culprit = Culprit(stage=stage, module=first.rpartition(".")[0], error=float("nan"), before=0.0)
    names = "; ".join(f"{weight.initializer} {problem}" for weight, problem in wrong[:SHOWN])
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    stale = len(wrong) > len(weights) // 2
    if stale and not causes:
        causes = ["most weights differ: a stale artifact, or another model's checkpoint"]
    note = f" ({skipped} more are quantized)" if skipped else ""
    yield judged(
        Level.GRAPH,
        stage,
        f"{len(weights) - skipped} weights{note}",
        Metric.COUNT,
        float(len(wrong)),
        EXACT,
        detail=names + more,
        culprit=culprit,
        causes=tuple(dict.fromkeys(causes)),
        against="checkpoint",
    )


def _check_quantized_values(context: Context, stage: str, model: ir.Model) -> Result:
    """Check that dequantized weights are the checkpoint's, and that input scales are those of the recorded plan."""
    plans, problem = context.candidate.plans[stage], ""
    try:
        check_scales(model, plans, quantizable_layers(context.reference.load(stage)))
    except BuildError as e:
        problem = str(e)
    culprit = None
    if problem:
        culprit = Culprit(stage=stage, module=problem.partition(":")[0], error=float("nan"), before=0.0)
    return judged(
        Level.GRAPH,
        stage,
        f"quantized values and scales of {len(plans)} layers",
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


def lora_changed(context: Context, stage: str) -> dict[str, Tensor]:
    """The tensors of a stage that LoRAs change, by name, as they are without LoRAs."""
    names = context.reference.plan.stages[stage].components
    folded, plain = context.reference.checkpoint, context.reference.original
    return {
        tensor: plain.component(name).tensors[tensor]
        for name in names
        for tensor in folded.component(name).tensors
        if folded.component(name).tensors.entry(tensor) is not plain.component(name).tensors.entry(tensor)
    }


def _lora_causes(weight: Weight, value: ir.Value | None, source: Tensor | None, plain: Tensor) -> list[str]:
    """Why a weight with LoRAs differs, if the numbers show it."""
    if value is None or value.const_value is None or source is None:
        return []
    stored = stored_tensor(value)
    if stored.numel() != source.numel():
        return []
    shape = tuple(stored.shape)
    wanted, own = (apply(weight, tensor, stored_shape=shape) for tensor in (source, plain))
    cause = change_cause(stored, wanted, own) if stored.shape == wanted.shape else ""
    return [cause] if cause else []


def _difference(weight: Weight, value: ir.Value | None, source: Tensor | None, *, lora: bool = False) -> str:
    """What is wrong with one weight; "" if it equals the checkpoint's, rounded to the graph's element type.

    Args:
        lora: whether the checkpoint's tensor is the sum of its own values and a LoRA's, which may round differently.
    """
    if source is None:
        return "is not in the checkpoint"
    if value is None or value.const_value is None:
        return "is not in the graph"
    stored = stored_tensor(value)
    wanted: Tensor = source.to(stored.dtype)
    if wanted.numel() == stored.numel():
        wanted = apply(weight, wanted, stored_shape=tuple(stored.shape))
    if stored.shape != wanted.shape:
        return f"has shape {tuple(stored.shape)}, but the checkpoint has {tuple(wanted.shape)}"
    if torch.equal(stored, wanted) or (lora and rounds_alike(stored, wanted)):
        return ""
    if not stored.any():
        return "is all zeros"
    if stored.dim() == 2 and stored.shape[0] == stored.shape[1] and torch.equal(stored.T, wanted):
        return "is transposed"
    return f"differs in {int((stored != wanted).sum())} of {stored.numel()} values"


def _check_schedule(context: Context) -> Result:
    """Compare the candidate's schedule with diffusers', or with the reference's where diffusers is left out."""
    settings, plan = context.settings, context.reference.plan
    steps = settings.num_inference_steps
    patches = plan.latents.num_patches(settings.height, settings.width)
    table = coefficient_table(context.candidate.manifest.scheduler, steps, image_seq_len=patches)
    reference = coefficient_table(plan.scheduler, steps, image_seq_len=patches)
    timesteps, sigmas, against = reference.timesteps, reference.sigmas, "the checkpoint's scheduler_config"
    upstream = context.upstream()
    if upstream is not None:
        scheduler = upstream.pipeline.scheduler
        timesteps, sigmas = _upstream_schedule(scheduler, plan.scheduler, steps, patches)
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


def _upstream_schedule(
    scheduler: Any, params: SchedulerParams, steps: int, patches: int
) -> tuple[Array, Array]:
    """The timesteps that upstream's network sees, and the sigmas; for SCM, its angles, from which both follow."""
    if params.kind is SchedulerKind.SCM:
        middle = params.intermediate_timesteps if steps == 2 else None
        scheduler.set_timesteps(steps, max_timesteps=params.max_timesteps, intermediate_timesteps=middle)
        sin, cos = torch.sin(scheduler.timesteps), torch.cos(scheduler.timesteps)
        return _host(sin / (cos + sin))[:-1], _host(scheduler.timesteps)
    dynamic = params.use_dynamic_shifting
    scheduler.set_timesteps(steps, **({"mu": dynamic_mu(params, patches)} if dynamic else {}))
    return _host(scheduler.timesteps) * np.float32(params.timestep_scale), _host(scheduler.sigmas)


def _host(tensor: Tensor) -> Array:
    return tensor.float().cpu().numpy()
