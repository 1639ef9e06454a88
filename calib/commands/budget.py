"""`ditc calibrate --budget psnr=40`: the table, the curve and the recipe of a precision search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from rich.console import Console

from ditc.calib.chart import curve_svg
from ditc.calib.search import Budget, Point, Result, save_result, search
from ditc.calib.sensitivity import base_recipe, candidate_plans, flops_shares, measure_effects
from ditc.calib.trial import Trial
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.quant.formats import Format
from ditc.export.quant.plan import make_plan
from ditc.export.quant.ranges import Ranges
from ditc.export.quant.recipes import save_recipe
from ditc.parity.reference.pytorch import Twin
from ditc.runtime.atomic import write_atomic
from ditc.runtime.errors import UsageError

# Few pictures decide by chance: of four, one whose trajectory parts from the reference's moves the mean by 5 dB.
PROMPTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What a search leaves beside the ranges: the recipe for --recipe, all numbers, the curve."""

    recipe: Path
    table: Path
    curve: Path


def find_mixed(
    checkpoint: str | Path | Checkpoint,
    ranges: Ranges,
    prompts: Sequence[str],
    budget: Budget,
    formats: Sequence[Format],
    *,
    picture_seconds: float,
    console: Console,
) -> Result:
    """Measure every layer, search, and confirm the recipe as a build will apply it.

    Raises:
        UsageError: not one layer fits the budget.
    """
    begun = monotonic()
    twin = Twin(checkpoint)
    with console.status("drawing the reference") as status:
        trial = Trial(twin, prompts[:PROMPTS], seed=ranges.origin.seed)
        plans = candidate_plans(trial, ranges, formats)
        effects = measure_effects(
            trial,
            plans,
            flops_shares(trial.layers, ranges),
            picture_seconds=picture_seconds,
            on_progress=lambda done, total: status.update(f"layer by layer: {done} of {total}"),
        )

        def on_point(point: Point) -> None:
            status.update(f"{point.share:.0%} of FLOPs in 8 bits: {point.fidelity.psnr_db:.1f} dB")

        base = base_recipe(formats[0], trial.family)
        result = search(trial, plans, effects, budget, base, on_point=on_point)
        if not result.chosen.layers:
            raise UsageError(
                f"no layer fits the budget {budget}: the least sensitive one alone passes it",
                hint="allow more, or build without 8 bits",
            )
        # Layers that stay high change what their neighbours' smoothing must suit: measure what will be built.
        final = make_plan(result.recipe, ranges, trial.layers).layers
        result = replace(result, chosen=replace(result.chosen, fidelity=trial.fidelity(final)))
    console.print(f"searched in {monotonic() - begun:.0f} s")
    return result


def write_result(result: Result, ranges: Path) -> Files:
    """Write recipe, table and curve beside the ranges."""
    files = Files(
        recipe=ranges.with_suffix(".mixed.json"),
        table=ranges.with_suffix(".sensitivity.json"),
        curve=ranges.with_suffix(".curve.svg"),
    )
    save_recipe(result.recipe, files.recipe)
    save_result(result, files.table)
    write_atomic(files.curve, curve_svg(result))
    return files


def as_text(result: Result) -> str:
    """The table and the curve for a reader, worst layer first."""
    lines = [f"{'layer':<44}{'format':<7}{'FLOPs':>7}{'step':>10}{'per token':>11}{'picture':>10}  "]
    for e in result.effects:
        picture = "-" if e.picture_db is None else f"{e.picture_db:.1f} dB"
        lines.append(
            f"{e.layer:<44}{e.kind.value:<7}{e.share:>7.2%}{e.step_error:>10.2e}{e.per_token_error:>11.2e}{picture:>10}"
        )
    lines.append(f"\n{'8-bit layers':>12}{'FLOPs':>9}{'PSNR':>10}{'worst':>9}{'latents':>10}")
    for p in (*result.curve, result.chosen):
        f = p.fidelity
        lines.append(
            f"{p.layers:>12}{p.share:>9.1%}{f.psnr_db:>7.1f} dB{f.worst_db:>6.1f} dB{f.rel_l2:>10.4f}"
            f"{'  <- chosen, ' + result.budget if p is result.chosen else ''}"
        )
    return "\n".join(lines) + "\n"
