"""Measure ranges: run the reference pipeline over prompts and steps, and count what its Linears read.

One request a prompt, so that no result depends on what a prompt was batched with: any split over machines merges
to the same counts, and a killed run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from ditc.calib.observe import Observer, watching
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.contract import BuildOptions, StageModule
from ditc.export.graph.torch_session import TorchSession
from ditc.export.quant.layers import linear_layers
from ditc.export.quant.ranges import (
    Origin,
    Ranges,
    Statistics,
    checkpoint_identity,
    load_ranges,
    save_ranges,
)
from ditc.parity.reference.pytorch import Twin
from ditc.runtime.errors import UsageError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.spec import DENOISER, Precision

log = logging.getLogger(__name__)

BUCKETS = 10
SAVE_EVERY_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured. None takes the checkpoint's default; shard (i, n) takes every n-th prompt from the i-th."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    precision: Precision = Precision.FP32
    device: str = "cpu"
    shard: tuple[int, int] = (0, 1)


@dataclass(frozen=True, slots=True)
class Progress:
    """Steps done of all that this run must do, and seconds since it began."""

    done: int
    total: int
    seconds: float


def collect(
    checkpoint: str | Path | Checkpoint,
    prompts: Sequence[str],
    out: Path,
    settings: Settings,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Ranges:
    """Measure and write `out`. What an earlier, killed run with the same settings has measured is kept.

    Raises:
        UsageError: settings that cannot be served. CheckpointError: a checkpoint that cannot be read.
    """
    _check_device(settings.device)
    twin = Twin(checkpoint, options=BuildOptions(precision=settings.precision))
    origin = _origin(twin, settings)
    partial = out.with_name(f"{out.name}.unfinished")
    index, count = settings.shard
    mine = [(number, prompt) for number, prompt in enumerate(prompts) if number % count == index]
    if not mine:
        raise UsageError(f"shard {index}/{count} of {len(prompts)} prompts is empty", hint="use fewer shards")
    digests = {_digest(prompt) for _, prompt in mine}
    finished = _finished(out, origin, digests)
    if finished is not None:
        return finished
    observer, seen = _resume(partial, origin, digests)
    missing = [(number, prompt) for number, prompt in mine if _digest(prompt) not in seen]
    stage = twin.load(DENOISER)
    pipeline = _pipeline(twin, stage, settings.device)
    total, begun, saved = len(missing) * origin.num_inference_steps, monotonic(), monotonic()
    done = 0
    with watching(linear_layers(stage), observer.see):
        for number, prompt in missing:
            for _ in _steps(pipeline, observer, prompt, number, origin):
                done += 1
                on_progress(Progress(done, total, monotonic() - begun))
            seen.append(_digest(prompt))
            if monotonic() - saved > SAVE_EVERY_S:
                save_ranges(_ranges(observer, origin, seen), partial)
                saved = monotonic()
    ranges = _ranges(observer, origin, seen)
    save_ranges(ranges, out)
    partial.unlink(missing_ok=True)
    return ranges


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # AssertionError: "Torch not compiled with CUDA enabled"
        raise UsageError(
            f"PyTorch cannot compute on {device!r}: {str(e).splitlines()[0]}",
            hint="take cpu, or cuda with a CUDA build of torch",
        ) from e


def _steps(
    pipeline: Pipeline, observer: Observer, prompt: str, number: int, origin: Origin
) -> Iterator[None]:
    request = Request(
        prompt=prompt,
        num_inference_steps=origin.num_inference_steps,
        guidance_scale=origin.guidance_scale,
        seed=origin.seed + number,
    )
    observer.bucket = 0
    for step in pipeline.steps(request):
        observer.forget_tensor()
        # The observer must know the bucket before the step runs: this one is the next step's.
        observer.bucket = min((step.index + 1) * observer.buckets // step.total, observer.buckets - 1)
        yield


def _pipeline(twin: Twin, stage: StageModule, device: str) -> Pipeline:
    return twin.pipeline.with_sessions({DENOISER: TorchSession(stage.module, stage.spec, device=device)})


def _origin(twin: Twin, settings: Settings) -> Origin:
    defaults, component = twin.plan.defaults, twin.plan.stages[DENOISER].components[0]
    steps = settings.num_inference_steps or defaults.num_inference_steps
    guidance = settings.guidance_scale
    return Origin(
        identity=checkpoint_identity(twin.checkpoint, component),
        network=component,
        dtype=settings.precision.value,
        num_inference_steps=steps,
        guidance_scale=defaults.guidance_scale if guidance is None else guidance,
        seed=settings.seed,
        buckets=min(BUCKETS, steps),
    )


def _finished(out: Path, origin: Origin, mine: set[str]) -> Ranges | None:
    """What an earlier run of the same settings and prompts has written."""
    if not out.exists():
        return None
    try:
        ranges = load_ranges(out)
    except UsageError:
        return None  # not ours or damaged: measured again and replaced
    return ranges if ranges.origin == origin and set(ranges.prompts) == mine else None


def _resume(partial: Path, origin: Origin, mine: set[str]) -> tuple[Observer, list[str]]:
    """What an unfinished run of the same settings has left, else nothing."""
    observer = Observer(origin.buckets)
    if not partial.exists():
        return observer, []
    try:
        earlier = load_ranges(partial)
    except UsageError as e:
        log.warning("starting over: %s", e)
        return observer, []
    if earlier.origin != origin or not mine.issuperset(earlier.prompts):
        log.warning("starting over: %s was measured with other settings or prompts", partial)
        return observer, []
    observer.site_of = dict(earlier.site_of)
    # The arrays of a file are read-only views of it.
    observer.sites = {
        site: Statistics(**{field: getattr(s, field).copy() for field in Statistics.__slots__})
        for site, s in earlier.sites.items()
    }
    return observer, list(earlier.prompts)


def _ranges(observer: Observer, origin: Origin, seen: Sequence[str]) -> Ranges:
    return Ranges(origin=origin, sites=observer.sites, site_of=observer.site_of, prompts=tuple(sorted(seen)))


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]
