"""Picture level: compare the pictures that a user sees with the reference's for the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ditc.parity.cases import Case, CaseRun
from ditc.parity.context import Context
from ditc.parity.recipe_budget import check_budget
from ditc.parity.results import PicturePair, Result, failed, judged, not_checked
from ditc.runtime.errors import NumericsError, SessionError
from ditc.runtime.images import is_uniform
from ditc.runtime.metrics import psnr, ssim
from ditc.runtime.session import Array
from ditc.runtime.spec import DENOISER, VAE_DECODER
from ditc.runtime.tolerances import Level, Metric


def check(context: Context) -> Iterator[Result]:
    """Check PSNR and SSIM of every case, the budget of a searched recipe, and LPIPS where it is installed."""
    for case in context.settings.cases:
        try:
            run = context.candidate_run(case)
        except (SessionError, NumericsError) as e:
            yield failed(Level.PICTURE, VAE_DECODER, str(case), str(e), metric=Metric.PSNR)
            continue
        reference, against = _reference(context, case)
        yield from _compared(context, run, reference, against)
    yield from check_budget(context)
    why = _why_no_lpips()
    if why:
        yield not_checked(Level.PICTURE, VAE_DECODER, "LPIPS", why, metric=Metric.LPIPS)
    else:
        yield from _lpips(context)


def _reference(context: Context, case: Case) -> tuple[CaseRun, str]:
    upstream = context.upstream_run(case)
    run, against = (
        (upstream, context.name_of_upstream(case))
        if upstream is not None
        else (context.reference_run(case), "PyTorch fp32")
    )
    if run.picture is None or not np.isfinite(run.picture).all() or is_uniform(_bytes(run.picture)):
        raise NumericsError(
            f"the reference picture for {case} is missing, not finite or of one colour",
            hint="parity against it would prove nothing: check the checkpoint",
        )
    return run, against


def _compared(context: Context, run: CaseRun, reference: CaseRun, against: str) -> Iterator[Result]:
    case, wanted = run.case, reference.picture
    assert wanted is not None
    what = str(case)
    if run.picture is None:
        yield failed(Level.PICTURE, DENOISER, what, run.problem, metric=Metric.PSNR, against=against)
        return
    if run.picture.shape != wanted.shape:
        problem = f"the picture has shape {run.picture.shape}, but the reference has {wanted.shape}"
        yield failed(Level.PICTURE, VAE_DECODER, what, problem, metric=Metric.PSNR, against=against)
        return
    ours, theirs = frames_of(run.picture), frames_of(wanted)
    by_frame = [psnr(one, other) for one, other in zip(ours, theirs, strict=True)]
    worst = int(np.argmin(by_frame))
    found = {
        Metric.PSNR: by_frame[worst],
        Metric.SSIM: min(ssim(one, other) for one, other in zip(ours, theirs, strict=True)),
    }
    label = f"{case.prompt!r} seed {case.seed}" + (f", {case.edit}" if case.edit else "")
    if len(ours) > 1:
        label += f", frame {worst} of {len(ours)}, the worst"
        what += f", the worst of {len(ours)} frames: {worst}"
    context.evidence.pictures.append(
        PicturePair(
            case=label,
            reference=theirs[worst],
            candidate=ours[worst],
            psnr=found[Metric.PSNR],
            ssim=found[Metric.SSIM],
        )
    )
    if is_uniform(_bytes(run.picture)):
        yield failed(
            Level.PICTURE,
            VAE_DECODER,
            what,
            "the picture is of one colour",
            metric=Metric.PSNR,
            against=against,
        )
        return
    baseline = baseline_psnr(context, case, wanted)
    for metric, value in found.items():
        bound = context.bound(Level.PICTURE, metric, context.pictured_stage, pytorch=baseline)
        if metric is Metric.SSIM and bound is None:
            continue  # SSIM has a bound in fp32 only
        yield judged(Level.PICTURE, VAE_DECODER, what, metric, value, bound, against=against)


def baseline_psnr(context: Context, case: Case, wanted: Array) -> float | None:
    """PSNR in dB of the precision baseline's picture against `wanted`; None without such a picture."""
    if context.saved_reference is not None:
        saved = context.saved_reference.baseline_errors.get(case)
        return saved.psnr if saved else None
    run = context.baseline_run(case)
    if run is None or run.picture is None:
        return None
    return min(
        psnr(ours, theirs) for ours, theirs in zip(*map(frames_of, (run.picture, wanted)), strict=True)
    )


def frames_of(picture: Array) -> Array:
    """The frames (F,H,W,3) of a video, or a picture (H,W,3) as the only one."""
    return picture[None] if picture.ndim == 3 else picture


def _lpips(context: Context) -> Iterator[Result]:
    import lpips
    import torch

    network = lpips.LPIPS(net="alex", verbose=False)
    bound = context.bound(Level.PICTURE, Metric.LPIPS, context.pictured_stage)
    for pair in context.evidence.pictures:
        sides = (
            torch.from_numpy(p.copy()).permute(2, 0, 1)[None].float() * 2 - 1
            for p in (pair.candidate, pair.reference)
        )
        with torch.inference_mode():
            value = float(network(*sides))
        yield judged(Level.PICTURE, VAE_DECODER, pair.case, Metric.LPIPS, value, bound, against="reference")


def _bytes(picture: Array) -> Array:
    out: Array = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    return out


def _why_no_lpips() -> str:
    """Why LPIPS cannot be measured; "" if it can. It needs a package and AlexNet's weights. ditc fetches neither."""
    if find_spec("lpips") is None:
        return "the lpips package is not installed"
    import torch

    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    return f"the weights of its AlexNet are not at {weights}" if not weights.is_file() else ""
