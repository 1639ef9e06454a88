"""`ditc calibrate --budget psnr=40`: search for a recipe, and write it with the search's table and curve."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from rich.console import Console

from ditc.calib.chart import curve_svg
from ditc.calib.decoder_trial import DecoderTrial
from ditc.calib.search import Budget, Point, Result, save_result, search
from ditc.calib.sensitivity import base_recipe, candidate_plans, flops_shares, measure_effects
from ditc.calib.trial import Trial
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.quant.formats import Format
from ditc.export.quant.plan import make_plan
from ditc.export.quant.ranges import Ranges
from ditc.export.quant.recipes import save_recipe
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.atomic import write_atomic
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import VAE_DECODER

# How many prompts are drawn by default. With few pictures, chance decides: among four, a single picture whose
# trajectory departs from the reference's changes the mean PSNR by 5 dB.
PROMPTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files that a search writes in addition to the ranges.

    Attributes:
        recipe: for `ditc build --recipe`.
        table: everything that was measured, as JSON.
        curve: the chart of fidelity by share of FLOPs, as SVG.
        unfinished: what was measured so far, until the search has ended.
    """

    recipe: Path
    table: Path
    curve: Path
    unfinished: Path

    @classmethod
    def beside(cls, ranges: Path) -> Files:
        """The files of the search with this file of ranges."""
        return cls(
            recipe=ranges.with_suffix(".mixed.json"),
            table=ranges.with_suffix(".sensitivity.json"),
            curve=ranges.with_suffix(".curve.svg"),
            unfinished=ranges.with_suffix(".search.unfinished"),
        )


def find_mixed(
    checkpoint: str | Path | Checkpoint,
    ranges: Ranges,
    prompts: Sequence[str],
    budget: Budget,
    formats: Sequence[Format],
    *,
    journal: Path,
    picture_seconds: float,
    console: Console,
) -> Result:
    """Measure every layer, search for an assignment of formats, and measure its recipe as a build will apply it.

    Args:
        prompts: they are drawn, each with its own noise.
        journal: the file that keeps what was measured, so that a killed search goes on where it stopped.
        picture_seconds: the time limit for filling the table's column of final pictures.

    Raises:
        UsageError: even the least sensitive layer alone breaks the budget.
    """
    begun = monotonic()
    reference = TorchModel(checkpoint)
    with console.status("drawing the reference pictures") as status:
        kind_of_trial = DecoderTrial if ranges.origin.stage == VAE_DECODER else Trial
        trial = kind_of_trial(reference, prompts, seed=ranges.origin.seed, journal=journal)
        plans = candidate_plans(trial, ranges, formats)
        effects = measure_effects(
            trial,
            plans,
            flops_shares(trial.layers, ranges),
            picture_seconds=picture_seconds,
            on_progress=lambda done, total: status.update(f"measuring layer by layer: {done} of {total}"),
        )

        drawn = itertools.count(1)

        def on_point(point: Point) -> None:
            found = point.fidelity
            status.update(
                f"assignment {next(drawn)}: {point.share:.1%} of FLOPs in 8 bits, {point.per_token} of {point.layers} "
                f"layers with scales per token: mean {found.psnr_db:.1f} dB, worst {found.worst_db:.1f} dB"
            )

        base = base_recipe(formats[0], trial.family, trial.network)
        result = search(trial, plans, effects, budget, base, on_point=on_point)
        if not result.chosen.layers:
            raise UsageError(
                f"no layer can be in 8 bits within the budget {budget}: even the least sensitive one alone breaks it",
                hint="choose a larger budget, or build without 8 bits",
            )
        # The smoothing of a tensor is chosen for all 8-bit layers that read it, so it changes if some of them stay in
        # high precision. Therefore the recipe is planned and measured once more, as a build will apply it.
        final = make_plan(result.recipe, ranges, trial.layers).layers
        result = replace(result, chosen=replace(result.chosen, fidelity=trial.fidelity(final)))
    console.print(f"The search took {monotonic() - begun:.0f} s.")
    return result


def write_result(result: Result, ranges: Path) -> Files:
    """Write the recipe, the table and the curve next to the file of ranges."""
    files = Files.beside(ranges)
    save_recipe(result.recipe, files.recipe)
    save_result(result, files.table)
    write_atomic(files.curve, curve_svg(result))
    files.unfinished.unlink(missing_ok=True)
    return files


def as_text(result: Result) -> str:
    """The table, worst layer first, and the points of the curve, as text."""
    lines = [f"{'layer':<44}{'format':<7}{'FLOPs':>7}{'step':>10}{'per token':>11}{'picture':>10}  "]
    for e in result.effects:
        picture = "-" if e.picture_db is None else f"{e.picture_db:.1f} dB"
        lines.append(
            f"{e.layer:<44}{e.kind.value:<7}{e.share:>7.2%}{e.step_error:>10.2e}{e.per_token_error:>11.2e}{picture:>10}"
        )
    lines.append(
        f"\n{'8-bit layers':>12}{'per token':>11}{'FLOPs':>9}{'PSNR':>10}{'worst':>9}{'latents':>10}"
    )
    for p in (*result.curve, result.chosen):
        f = p.fidelity
        lines.append(
            f"{p.layers:>12}{p.per_token:>11}{p.share:>9.1%}{f.psnr_db:>7.1f} dB{f.worst_db:>6.1f} dB{f.rel_l2:>10.4f}"
            f"{'  <- chosen, ' + result.budget if p is result.chosen else ''}"
        )
    return "\n".join(lines) + "\n"
