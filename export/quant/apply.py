"""The quantization steps of a build: check recipes and ranges first, make the plans when the weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.contract import Adapter, BuildOptions, ModelPlan, StageModule
from ditc.export.quant.evidence import calibration_of, warn_of_doubts
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import QuantPlan, check_fits, make_plan
from ditc.export.quant.ranges import Ranges, check_identity, checkpoint_identity, load_ranges
from ditc.export.quant.recipes import Recipe
from ditc.export.quant.stage_recipes import find_recipes
from ditc.runtime.bundle.calibration import Calibration
from ditc.runtime.bundle.integrity import sha256
from ditc.runtime.errors import UsageError
from ditc.runtime.sessions.registry import row_of
from ditc.runtime.spec import CONTROLNET, DENOISER, VAE_DECODER, Precision

log = logging.getLogger(__name__)

# What OpenVINO 2026.4.1 fuses 8-bit convolutions with on a CPU. With a bf16 bias it takes a much slower kernel
# (jit_gemm in place of brgconv), and casts around a convolution keep activation and rounding out of it: 2.9 in place of
# 2.6 s for DC-AE f32c32 at 512 px (Xeon with avx512_vnni and avx512_bf16, 2 cores).
FUSED_BASE = Precision.FP32
NOT_FASTER = (
    "ONNX Runtime's CPU provider computes 8-bit convolutions in fp32, so there the decoder will be smaller but slower; "
    "OpenVINO computes them in 8 bits (--backend openvino)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How one stage is quantized: a recipe, and ranges that fit the checkpoint.

    Attributes:
        precision: of the stage's artifacts.
        ranges: None if the recipe needs none.
        ranges_sha256: hash of the file of ranges; None if there is no such file.
        calibration: what the ranges rest on; None if there are none.
    """

    recipe: Recipe
    precision: Precision
    ranges: Ranges | None
    ranges_sha256: str | None
    calibration: Calibration | None

    def plan(self, stage: StageModule) -> QuantPlan:
        """Make the plan for a stage whose weights are loaded. Raises UsageError as `make_plan` does."""
        return make_plan(self.recipe, self.ranges, quantizable_layers(stage))


def prepare(options: BuildOptions, checkpoint: Checkpoint, plan: ModelPlan) -> dict[str, Quantization]:
    """Find recipe and ranges of every stage that becomes 8-bit. Reasons to doubt the ranges are logged.

    Raises:
        UsageError: options contradict each other, a recipe is unknown or of another network, or ranges are missing,
            damaged, superfluous or of another checkpoint.
    """
    recipes = find_recipes(options, checkpoint, plan)
    if not recipes:
        for name, values in (("--ranges", options.ranges), ("--base-precision", (options.base_precision,))):
            for value in filter(None, values):
                raise UsageError(
                    f"{name} {value} belongs to an 8-bit build, but this one is {options.precision.value}",
                    hint="add --precision int8-dynamic, int8 or fp8, or a --recipe",
                )
    if VAE_DECODER in recipes and not (options.builds_engines or options.converts_graphs):
        log.warning("%s: %s", recipes[VAE_DECODER].name, NOT_FASTER)
    files = _read(options.ranges, recipes)
    found = {}
    for stage, recipe in recipes.items():
        precision = options.precision if stage == DENOISER else recipe.precision
        if stage != DENOISER and precision not in row_of(options.backend).precisions:
            raise UsageError(
                f"recipe {recipe.name} makes an {precision.value} {stage}, which is not made for {options.backend}",
                hint="leave it out, or build for another --backend",
            )
        path, ranges = files.get(stage, (None, None))
        if path is not None and not recipe.needs_ranges and recipe.activations:
            raise UsageError(
                f"--ranges {path} is given, but with {precision.value} every token of the {stage} has its own scale",
                hint=f"leave --ranges out, or build with --precision {Precision.INT8.value}",
            )
        if not recipe.needs_ranges:
            path, ranges = None, None
        if recipe.needs_ranges and ranges is None:
            which = "" if stage == DENOISER else f" --stage {stage}"
            measure = f"measure them: ditc calibrate {checkpoint.path}{which} -o ranges.safetensors"
            dynamic = Precision.INT8_DYNAMIC
            if (
                precision is Precision.INT8
                and stage == DENOISER
                and dynamic in row_of(options.backend).precisions
            ):
                measure = f"{dynamic.value} needs none and is closer to fp32: --precision {dynamic.value}; or {measure}"
            raise UsageError(
                f"recipe {recipe.name} quantizes activations and needs --ranges",
                hint=measure,
            )
        calibration = None
        if path is not None and ranges is not None:
            component = plan.stages[stage].components[0]
            check_identity(ranges.origin, checkpoint_identity(checkpoint, component), path)
            calibration = calibration_of(ranges)
            warn_of_doubts(calibration)
        found[stage] = Quantization(
            recipe=recipe,
            precision=precision,
            ranges=ranges,
            ranges_sha256=None if path is None else sha256(path),
            calibration=calibration,
        )
    return found


def _read(paths: tuple[Path, ...], recipes: Mapping[str, Recipe]) -> dict[str, tuple[Path, Ranges]]:
    """The ranges of each stage, and their file. Every file must belong to a recipe, and no two to one."""
    files: dict[str, tuple[Path, Ranges]] = {}
    for path in paths:
        ranges = load_ranges(path)
        stage = ranges.origin.stage
        if stage not in recipes:
            raise UsageError(
                f"{path} holds ranges of {stage}, but this build quantizes {', '.join(recipes)}",
                hint=f"leave it out, or add a --recipe for {stage}",
            )
        if stage in files:
            raise UsageError(
                f"{files[stage][0]} and {path} both hold ranges of {stage}",
                hint="give one of them, or add up shards: ditc calibrate --merge FILE ... -o FILE",
            )
        files[stage] = path, ranges
    return files


def with_base_precisions(
    plan: ModelPlan,
    quantizations: Mapping[str, Quantization],
    adapter: Adapter,
    checkpoint: Checkpoint,
    options: BuildOptions,
) -> ModelPlan:
    """The plan, in which other 8-bit stages than the denoiser have the precision of an 8-bit build.

    That is the precision of everything in them that is not in 8 bits. The plan itself gives them the precision that
    follows from the denoiser's. A decoder is fp32 in OpenVINO by default (see FUSED_BASE). A ControlNet keeps the
    plan's, because its outputs are inputs of the denoiser.
    """
    stages = dict(plan.stages)
    for name, quantization in quantizations.items():
        if name not in (DENOISER, CONTROLNET):
            around = adapter.plan(checkpoint, replace(options, precision=quantization.precision))
            precision = around.stages[name].precision
            if name == VAE_DECODER and options.converts_graphs and options.base_precision is None:
                precision = FUSED_BASE
            stages[name] = replace(stages[name], precision=precision)
    return replace(plan, stages=stages)


def check_layers(
    quantizations: Mapping[str, Quantization],
    adapter: Adapter,
    checkpoint: Checkpoint,
    plan: ModelPlan,
    options: BuildOptions,
) -> None:
    """Check that recipes and ranges fit the layers of their stages. No weight is read.

    Raises:
        UsageError: a recipe names no layer of its stage, or its ranges lack a layer or have another number of channels.
    """
    components = {
        name: replace(component, tensors=component.tensors.headers())
        for name, component in checkpoint.components.items()
    }
    headers = replace(checkpoint, components=components)
    for name, quantization in quantizations.items():
        layers = quantizable_layers(adapter.load(headers, plan, name, options))
        check_fits(quantization.recipe, quantization.ranges, layers)
