"""What ranges rest on: prompts and steps, how well the tokenizer knows the words, and whether two halves agree."""

from __future__ import annotations

import logging
import math

import numpy as np

from ditc.export.quant.estimators import least_error_amax, squared_error
from ditc.export.quant.formats import Format
from ditc.export.quant.histogram import edges
from ditc.export.quant.ranges import Ranges, Statistics, half_of
from ditc.runtime.bundle.calibration import Calibration
from ditc.runtime.session import Array

log = logging.getLogger(__name__)


def calibration_of(ranges: Ranges) -> Calibration:
    """Sum up what the ranges rest on."""
    second = sum(half_of(prompt.text) for prompt in ranges.prompts)
    halves = (len(ranges.prompts) - second, second)
    losses = (
        {site: half_loss_db(statistics) for site, statistics in ranges.sites.items()} if all(halves) else {}
    )
    worst = max(losses, key=losses.__getitem__, default="")
    return Calibration(
        prompts=len({prompt.ids for prompt in ranges.prompts}),
        num_inference_steps=ranges.origin.num_inference_steps,
        usual_steps=ranges.origin.usual_steps,
        buckets=ranges.origin.buckets,
        bytes_per_token=sum(p.size_bytes for p in ranges.prompts)
        / max(sum(p.tokens for p in ranges.prompts), 1),
        halves=halves,
        half_loss_db=float(np.percentile(list(losses.values()), 90)) if losses else None,
        half_loss_layer=worst,
    )


def warn_of_doubts(calibration: Calibration) -> None:
    """Log a warning for each reason to doubt the ranges."""
    for doubt in calibration.doubts:
        log.warning("%s", doubt)


def half_loss_db(statistics: Statistics) -> float:
    """How much more squared error INT8 makes on one half of the prompts with the other half's range, in dB.

    This compares what a range is for. The largest magnitudes of two halves differ more, but a single outlier that is
    clipped costs little.
    """
    first = statistics.half_histogram
    second = statistics.histogram.sum(axis=0) - first
    return max(_loss_db(first, second), _loss_db(second, first))


def _loss_db(judged: Array, other: Array) -> float:
    own, foreign = (squared_error(judged, _amax(counts), Format.INT8) for counts in (judged, other))
    return 10 * math.log10(foreign / own) if own > 0 else 0.0


def _amax(counts: Array) -> float:
    """The range with the least error. The upper edge of the last used bin stands for the largest magnitude."""
    return least_error_amax(counts, float(edges()[np.flatnonzero(counts)[-1] + 1]), Format.INT8)
