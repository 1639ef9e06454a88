"""Measure ranges: run the reference pipeline over prompts and steps, and count the input values of a stage's layers.

Every prompt is a request of its own, so that no result depends on which prompts were batched together. Therefore any
split of the prompts over machines merges to the same counts, and a killed run can be resumed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from ditc.calib.control_pattern import PATTERN, control_of
from ditc.calib.observe import Observer, watching
from ditc.calib.tokens import PromptTokens
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.contract import BuildOptions, StageModule
from ditc.export.graph.torch_session import TorchSession
from ditc.export.quant.formats import Format
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.ranges import (
    Origin,
    Prompt,
    Ranges,
    Statistics,
    checkpoint_identity,
    half_of,
    load_ranges,
    save_ranges,
)
from ditc.export.quant.stage_recipes import recipe_of_network
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.errors import UsageError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.spec import CONTROLNET, DENOISER, VAE_DECODER, Precision

log = logging.getLogger(__name__)

BUCKETS = 10  # parts of the schedule that are counted separately
SAVE_EVERY_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How ranges are measured.

    Attributes:
        num_inference_steps, guidance_scale: None takes the checkpoint's default.
        seed: of the first prompt; every further prompt has the next seed.
        precision: of the PyTorch networks that run.
        shard: (i, n) measures every n-th prompt, beginning with the i-th (counted from 0).
        stage: the stage whose layers are watched: the denoiser, the ControlNet before it, or the decoder of the latents
            that it leaves.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    precision: Precision = Precision.FP32
    device: str = "cpu"
    shard: tuple[int, int] = (0, 1)
    stage: str = DENOISER


@dataclass(frozen=True, slots=True)
class Progress:
    """How many of the run's steps are done, how many there are, and the seconds since it began."""

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
    """Measure ranges and write them to `out`. What a killed run with the same settings has measured is kept.

    Raises:
        UsageError: the device or the stage does not exist, the shard has no prompts, or no recipe could use the ranges.
        CheckpointError: the checkpoint cannot be read.
    """
    _check_device(settings.device)
    reference = TorchModel(checkpoint, options=BuildOptions(precision=settings.precision))
    _check_stage(reference, settings.stage)
    origin = _origin(reference, settings)
    partial = unfinished(out)
    index, count = settings.shard
    mine = [(number, prompt) for number, prompt in enumerate(prompts) if number % count == index]
    if not mine:
        raise UsageError(f"shard {index}/{count} of {len(prompts)} prompts is empty", hint="use fewer shards")
    digests = {_digest(prompt) for _, prompt in mine}
    finished = _finished(out, origin, digests)
    if finished is not None:
        return finished
    observer, seen = _resume(partial, origin, digests)
    known = {prompt.text for prompt in seen}
    missing = [(number, prompt) for number, prompt in mine if _digest(prompt) not in known]
    stage = reference.load(settings.stage)
    pipeline = _pipeline(reference, stage, settings.device)
    tokens = PromptTokens(reference)
    total, begun, saved = len(missing) * origin.num_inference_steps, monotonic(), monotonic()
    done = 0
    with watching(quantizable_layers(stage), observer.see):
        for number, prompt in missing:
            for _ in _steps(pipeline, observer, prompt, number, origin):
                done += 1
                on_progress(Progress(done, total, monotonic() - begun))
            seen.append(tokens.of(prompt, _digest(prompt)))
            if monotonic() - saved > SAVE_EVERY_S:
                save_ranges(_ranges(observer, origin, seen), partial)
                saved = monotonic()
    ranges = _ranges(observer, origin, seen)
    save_ranges(ranges, out)
    partial.unlink(missing_ok=True)
    return ranges


def unfinished(out: Path) -> Path:
    """Where ranges are kept until all prompts are done."""
    return out.with_name(f"{out.name}.unfinished")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # AssertionError: "Torch not compiled with CUDA enabled"
        raise UsageError(
            f"PyTorch cannot compute on {device!r}: {str(e).splitlines()[0]}",
            hint="use --device cpu, or cuda with a CUDA build of torch",
        ) from e


def _check_stage(reference: TorchModel, stage: str) -> None:
    """Refuse a stage that is not there, and a decoder without a recipe, whose ranges nothing could read."""
    if stage not in reference.plan.stages:
        raise UsageError(
            f"{reference.checkpoint.path} has no {stage} to measure",
            hint="name the folder of its ControlNet: --controlnet DIR" if stage == CONTROLNET else None,
        )
    if stage == VAE_DECODER:
        component = reference.plan.stages[stage].components[0]
        recipe_of_network(reference.checkpoint.component(component).class_name, Format.INT8)


def _steps(
    pipeline: Pipeline, observer: Observer, prompt: str, number: int, origin: Origin
) -> Iterator[None]:
    request = Request(
        prompt=prompt,
        num_inference_steps=origin.num_inference_steps,
        guidance_scale=origin.guidance_scale,
        seed=origin.seed + number,
        control_image=control_of(number, origin.seed + number, always=origin.stage == CONTROLNET)
        if origin.control is not None
        else None,
    )
    observer.bucket, observer.half = 0, half_of(_digest(prompt))
    plan = pipeline.plan(request)
    states = list(pipeline.start(plan))
    for step in pipeline.run(states):
        states[step.chunk] = step.state
        observer.forget_tensor()
        # The observer needs the bucket before a step runs, so this is the bucket of the next step.
        observer.bucket = min((step.index + 1) * observer.buckets // step.total, observer.buckets - 1)
        if step.index + 1 == step.total and origin.stage == VAE_DECODER:
            pipeline.decode(states, plan)
            observer.forget_tensor()
        yield


def _pipeline(reference: TorchModel, stage: StageModule, device: str) -> Pipeline:
    session = TorchSession(stage.module, stage.spec, device=device)
    return reference.pipeline.with_sessions({stage.spec.name: session})


def _origin(reference: TorchModel, settings: Settings) -> Origin:
    defaults, component = reference.plan.defaults, reference.plan.stages[settings.stage].components[0]
    steps = settings.num_inference_steps or defaults.num_inference_steps
    guidance = settings.guidance_scale
    return Origin(
        identity=checkpoint_identity(reference.checkpoint, component),
        network=component,
        dtype=settings.precision.value,
        num_inference_steps=steps,
        guidance_scale=defaults.guidance_scale if guidance is None else guidance,
        seed=settings.seed,
        buckets=1 if settings.stage == VAE_DECODER else min(BUCKETS, steps),
        usual_steps=defaults.num_inference_steps,
        stage=settings.stage,
        control=PATTERN if CONTROLNET in reference.plan.stages else None,
    )


def _finished(out: Path, origin: Origin, mine: set[str]) -> Ranges | None:
    """The ranges in `out` if a run with the same settings and prompts has written them, else None."""
    if not out.exists():
        return None
    try:
        ranges = load_ranges(out)
    except UsageError:
        return None  # another kind of file, or a damaged one: it is measured again and replaced
    return ranges if ranges.origin == origin and {prompt.text for prompt in ranges.prompts} == mine else None


def _resume(partial: Path, origin: Origin, mine: set[str]) -> tuple[Observer, list[Prompt]]:
    """The counts and prompts that an unfinished run with the same settings has saved; empty ones without such a run."""
    observer = Observer(origin.buckets)
    if not partial.exists():
        return observer, []
    try:
        saved = load_ranges(partial)
    except UsageError as e:
        log.warning("cannot resume, so all prompts are measured: %s", e)
        return observer, []
    if saved.origin != origin or not mine.issuperset(prompt.text for prompt in saved.prompts):
        log.warning(
            "cannot resume, so all prompts are measured: %s was measured with other settings or prompts",
            partial,
        )
        return observer, []
    observer.site_of = dict(saved.site_of)
    # Arrays that were loaded are read-only views of the file, so they are copied.
    observer.sites = {
        site: Statistics(**{field: getattr(s, field).copy() for field in Statistics.__slots__})
        for site, s in saved.sites.items()
    }
    return observer, list(saved.prompts)


def _ranges(observer: Observer, origin: Origin, seen: Sequence[Prompt]) -> Ranges:
    prompts = tuple(sorted(seen, key=lambda prompt: prompt.text))
    return Ranges(origin=origin, sites=observer.sites, site_of=observer.site_of, prompts=prompts)


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]
