"""The quantization steps of a build: check recipe and ranges first, make the plan when the weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.contract import BuildOptions, ModelPlan, StageModule
from ditc.export.quant.evidence import calibration_of, warn_of_doubts
from ditc.export.quant.layers import linear_layers
from ditc.export.quant.plan import QuantPlan, make_plan
from ditc.export.quant.ranges import Ranges, checkpoint_identity, load_ranges
from ditc.export.quant.recipes import Recipe, find_recipe
from ditc.runtime.bundle.calibration import Calibration
from ditc.runtime.bundle.integrity import sha256
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import DENOISER


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A recipe, and ranges that fit the checkpoint.

    Attributes:
        ranges: None if the recipe quantizes only weights.
        ranges_sha256: hash of the file of ranges; None if there is no such file.
        calibration: what the ranges rest on; None if there are none.
    """

    recipe: Recipe
    ranges: Ranges | None
    ranges_sha256: str | None
    calibration: Calibration | None

    def plan(self, stage: StageModule) -> QuantPlan:
        """Make the plan for a stage whose weights are loaded. Raises UsageError as `make_plan` does."""
        return make_plan(self.recipe, self.ranges, linear_layers(stage))


def prepare(options: BuildOptions, checkpoint: Checkpoint, plan: ModelPlan) -> Quantization | None:
    """Find recipe and ranges of an 8-bit build; None for any other build. Reasons to doubt the ranges are logged.

    Raises:
        UsageError: options contradict each other, the recipe is unknown, or the ranges are missing, damaged or of
            another checkpoint.
    """
    if not options.quantized:
        for name, value in (
            ("--recipe", options.recipe),
            ("--ranges", options.ranges),
            ("--base-precision", options.base_precision),
        ):
            if value is not None:
                raise UsageError(
                    f"{name} {value} belongs to an 8-bit build, but this one is {options.precision.value}",
                    hint="add --precision int8 or --precision fp8",
                )
        return None
    recipe = find_recipe(options.recipe, options.precision, plan.family)
    if not recipe.activations:
        return Quantization(recipe=recipe, ranges=None, ranges_sha256=None, calibration=None)
    if options.ranges is None:
        raise UsageError(
            f"recipe {recipe.name} quantizes activations and needs --ranges",
            hint=f"measure them: ditc calibrate {checkpoint.path} -o ranges.safetensors",
        )
    component = plan.stages[DENOISER].components[0]
    ranges = load_ranges(options.ranges, identity=checkpoint_identity(checkpoint, component))
    calibration = calibration_of(ranges)
    warn_of_doubts(calibration)
    return Quantization(
        recipe=recipe, ranges=ranges, ranges_sha256=sha256(options.ranges), calibration=calibration
    )
