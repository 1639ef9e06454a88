"""Check options, weights and free disk space before the first export, and report how much memory it will need."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ditc.export.build import estimates
from ditc.export.checkpoint.open import Checkpoint, check_finite
from ditc.export.checkpoint.release_memory import release_memory
from ditc.export.contract import Adapter, BuildOptions, ModelPlan
from ditc.export.engine.ir import check_openvino
from ditc.export.engine.memory import estimate_build_bytes
from ditc.export.graph.ops.relu_linear_attention.ptx import load_kernels
from ditc.export.options import OPSETS
from ditc.runtime.errors import UsageError
from ditc.runtime.sessions.registry import build_backends, row_of
from ditc.runtime.spec import Precision

log = logging.getLogger(__name__)


def check_options(options: BuildOptions) -> None:
    """Refuse options that no checkpoint could be built with.

    Raises:
        UsageError: an option has a value that is not supported; the message names both.
        MissingExtra: Triton is not installed, and --linear-attention plugin needs it; or OpenVINO, for its backend.
    """
    if options.max_batch < 1:
        raise UsageError(f"max_batch is {options.max_batch}", hint="max_batch must be at least 1")
    if options.resolution is not None and options.resolution < 1:
        raise UsageError(
            f"resolution is {options.resolution} pixels",
            hint="leave --resolution out to use the checkpoint's own",
        )
    if options.opset not in OPSETS:
        raise UsageError(f"opset is {options.opset}", hint=f"use one of {', '.join(map(str, OPSETS))}")
    if options.opset != OPSETS[0] and options.builds_engines:
        # TensorRT-RTX 1.7.1's parser says: "Setting softmax precision is not supported in TensorRT Attention." Without
        # that setting, the softmax of a 16-bit graph would be 16-bit.
        raise UsageError(
            f"opset {options.opset} cannot be built into engines: their parser refuses Attention with an fp32 softmax",
            hint=f"leave --opset out: in opset {OPSETS[0]} the same attention is written in plain nodes",
        )
    if options.opset != OPSETS[0] and options.converts_graphs:
        raise UsageError(
            f"opset {options.opset} is not made for {options.backend}: its Attention may not keep an fp32 softmax",
            hint=f"leave --opset out: in opset {OPSETS[0]} the same attention is written in plain nodes",
        )
    _check_runs_precisions(options)
    if options.converts_graphs:
        check_openvino()
    if options.lora_inputs and options.builds_engines:
        raise UsageError(
            f"--lora-inputs is not made for {options.backend}, whose engines take no matrices of any rank",
            hint="leave it out, and build with --refit",
        )
    if options.lora_inputs and options.quantized:
        raise UsageError(
            f"--lora-inputs is not made for {options.precision.value}: its products have 8-bit weights",
            hint="leave it out: LoRAs can still be added to the weights, which takes longer",
        )
    if not options.builds_engines:
        _check_no_engine_options(options)
    elif options.refit and options.quantized:
        raise UsageError(
            f"--refit is not made for {options.precision.value}: TensorRT would have to exchange codes and scales",
            hint="put the LoRA into the weights with --lora, which quantizes the sum; or build in 16 bits",
        )
    elif options.linear_attention == "plugin":
        load_kernels()


def _check_no_engine_options(options: BuildOptions) -> None:
    for text, given in (
        (f"--targets {','.join(options.targets)}", options.targets),
        ("--linear-attention plugin", options.linear_attention == "plugin"),
        ("--weight-streaming", options.weight_streaming),
        ("--refit", options.refit),
    ):
        if given:
            raise UsageError(
                f"{text} is an option of engines, but this build makes none",
                hint="add " + " or ".join(f"--backend {b}" for b in build_backends() if row_of(b).same_gpu),
            )


def _check_runs_precisions(options: BuildOptions) -> None:
    known, dynamic = row_of(options.backend).precisions, Precision.INT8_DYNAMIC
    if options.precision is dynamic and dynamic not in known:
        raise UsageError(
            f"precision {dynamic.value} is not made for {options.backend}: an engine's scales are part of it",
            hint=f"measure ranges with ditc calibrate, and build with --precision {Precision.INT8.value}; "
            f"{dynamic.value} is for CPUs, with --backend "
            + " or ".join(name for name in build_backends() if dynamic in row_of(name).precisions),
        )
    if options.precision is dynamic and options.base is not Precision.FP32:
        raise UsageError(
            f"--base-precision {options.base.value} does not fit {dynamic.value}, whose other parts are fp32",
            hint="leave --base-precision out",
        )
    for precision in (options.precision, options.base):
        if precision not in known:
            raise UsageError(
                f"precision {precision.value} is not made for {options.backend}",
                hint=f"choose one of {', '.join(known)}, or another --backend",
            )


def check_weights(
    checkpoint: Checkpoint,
    adapter: Adapter,
    plan: ModelPlan,
    options: BuildOptions,
    out: Path,
    stages: Sequence[str],
    on_progress: Callable[[str, str], None],
) -> None:
    """Check names, shapes and values of the stages' weights, and free space; report the memory that the export needs.

    Args:
        on_progress: called with a component's name or "memory", and a text about it.

    Raises:
        CheckpointError: a weight is missing, has a different shape from the config's, or is not finite.
        BuildError: the disk has too little free space.
    """
    headers = {
        name: replace(component, tensors=component.tensors.headers())
        for name, component in checkpoint.components.items()
    }
    needed = {}
    for name in stages:
        stage = adapter.load(replace(checkpoint, components=headers), plan, name, options)
        size = estimates.stage_size(stage, plan.latents.scale_factor, plan.latents.frames_per_cell or 1)
        needed[name] = estimates.build_bytes(size)
        if options.builds_engines:
            needed[f"{name} engine"] = estimates.FIXED_BYTES + estimate_build_bytes(size.weight_bytes)
    sizes = {name: weight_bytes(checkpoint, plan, name) for name in stages}
    components = {c: name for name in stages for c in plan.stages[name].components}
    estimates.check_disk(
        out,
        [(component, sizes[name]) for component, name in components.items()],
        engines=options.builds_engines or options.converts_graphs,
    )
    on_progress("memory", _memory_needed(needed))
    for component in components:
        on_progress(component, "reading every weight")
        check_finite(checkpoint.component(component))
        release_memory(checkpoint.component(component).files)


def weight_bytes(checkpoint: Checkpoint, plan: ModelPlan, name: str) -> int:
    """Bytes of the stage's weights in its deployment precision."""
    stage = plan.stages[name]
    return estimates.weight_bytes(map(checkpoint.component, stage.components), stage.precision)


def _memory_needed(needed: dict[str, int]) -> str:
    name, most = max(needed.items(), key=lambda item: item[1])
    free = estimates.available_memory_bytes()
    text = f"needs about {most / 1e9:.1f} GB of memory (for {name}); {free / 1e9:.1f} GB are free"
    if most > free:
        log.warning("the build %s: it may swap or be killed", text)
    return text
