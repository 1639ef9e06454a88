"""Check that a searched recipe keeps its budget on the pictures of this run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ditc.parity.context import Context
from ditc.parity.results import Result, judged
from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.spec import DENOISER, VAE_DECODER, Precision
from ditc.runtime.tolerances import Level, Limit, Metric

REASON = "the budget for which `ditc calibrate --budget` searched this recipe"


def check_budget(context: Context) -> Iterator[Result]:
    """Compare the run's pictures with the budget in the way the search did.

    A budget psnr=DB bounds the mean PSNR of the pictures, worst=DB each of them, rel_l2=SHARE the relative L2 of all
    final latents together. There is no result for a recipe that was not searched for, or if a run failed. A decoder's
    recipe was searched for beside an fp32 denoiser, so its budget counts only there.
    """
    for part in filter(None, (context.candidate.budgets.get(DENOISER) or "").split(",")):
        yield from _check_part(context, *part.split("=", 1))
    if context.candidate.precision(DENOISER) is Precision.FP32:
        for part in filter(None, (context.candidate.budgets.get(VAE_DECODER) or "").split(",")):
            if not part.startswith("rel_l2"):  # of pictures there, of latents here
                yield from _check_part(context, *part.split("=", 1))


def _check_part(context: Context, metric: str, text: str) -> Iterator[Result]:
    pairs = [
        (context.candidate_run(c), context.reference_run(c)) for c in context.settings.cases if c.edit is None
    ]
    what = f"{len(pairs)} pictures, budget {metric}={text}"
    common = {"against": "PyTorch fp32"}
    pictures = [(ours.picture, theirs.picture) for ours, theirs in pairs]
    if metric in ("psnr", "worst") and all(a is not None and b is not None for a, b in pictures):
        each = [psnr(a, b) for a, b in pictures if a is not None and b is not None]
        name, value = ("mean", float(np.mean(each))) if metric == "psnr" else ("worst", min(each))
        bound = Limit(float(text), REASON)
        yield judged(Level.PICTURE, VAE_DECODER, f"{name} of {what}", Metric.PSNR, value, bound, **common)
    elif metric == "rel_l2" and not any(ours.problem for ours, _ in pairs):
        last = (np.concatenate([run.latents[-1] for run in side]) for side in zip(*pairs, strict=True))
        value = relative_l2(*last)
        bound = Limit(float(text), REASON)
        yield judged(
            Level.PICTURE, DENOISER, f"latents of {what}", Metric.RELATIVE_L2, value, bound, **common
        )
