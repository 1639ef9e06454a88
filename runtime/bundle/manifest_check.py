"""Checks the values of a manifest once, after it was read.

Types and digest say nothing about them: anybody can seal a manifest in which a batch holds -1 samples. All code below
uses the numbers and looks up the names without checking them again.
"""

# C latent channels

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ditc.runtime.bundle.jsondata import Mismatch
from ditc.runtime.limits import (
    LARGEST_NUMBER,
    MAX_BATCH,
    MAX_FPS,
    MAX_FRAMES,
    MAX_SIDE,
    MAX_STEPS,
    MAX_TOKENS,
    MAX_VALUES,
)
from ditc.runtime.schedulers import SchedulerParams, Spacing, draws_noise, history_length
from ditc.runtime.spec import (
    CONDITIONER,
    CONTROL_CONDITIONER,
    CONTROLNET,
    DENOISER,
    VAE_DECODER,
    VAE_DECODER_NEXT,
    DType,
    Range,
    StageSpec,
    TensorSpec,
)
from ditc.runtime.step_contract import (
    BATCH,
    COEFFICIENTS,
    CONTROL_LATENTS,
    CONTROL_RESIDUAL,
    CONTROL_SCALE,
    HEIGHT,
    HISTORY,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    KEPT,
    LATENTS,
    NEXT_KEPT,
    ROW_OF,
    TEXT_LENGTH,
    TIMESTEP,
    VIDEO_AXES,
    VIDEO_FRAMES,
    WIDTH,
    coefficient_columns,
)
from ditc.runtime.text import TextSpec, TokenBatch

if TYPE_CHECKING:
    from ditc.runtime.bundle.manifest import Defaults, FileRef, GoldenTable, LatentSpec, Manifest, Stage

# The size of any dimension. Those of real models are below 2^18 (vocabularies).
MAX_DIMENSION = 2**24
MAX_RANK = 8
# Instructions before prompts have about 1,000 characters.
MAX_PREFIX = 2**16
# diffusers' pipelines have at most three text encoders, and a Request has names for three texts.
MAX_ENCODERS = 3


def check_manifest(manifest: Manifest) -> None:
    """Check that every number lies in a sane range, that tables have the stated form, and that names can be looked up.

    Raises:
        Mismatch: the message begins with the path of the field.
    """
    for name, stage in manifest.stages.items():
        _check_stage(name, stage, f"$.stages.{name}")
    for ref in manifest.all_files():
        _check_file(ref)
    _check_scheduler(manifest.scheduler, "$.scheduler")
    _check_golden_table(manifest.golden_table, manifest.scheduler, "$.golden_table")
    _check_latents(manifest.latents, "$.latents")
    _check_defaults(manifest.defaults, manifest.latents, "$.defaults")
    _check_text(manifest)
    _check_links(manifest)


def _require(condition: bool, path: str, problem: str) -> None:
    if not condition:
        raise Mismatch(f"{path}: {problem}")


def _between(value: float, low: float, high: float, path: str) -> None:
    _require(low <= value <= high, path, f"{value} is not between {low} and {high}")


def _check_stage(name: str, stage: Stage, path: str) -> None:
    _require(bool(stage.artifacts), path, "the stage has no artifact")
    for i, artifact in enumerate(stage.artifacts):
        spec, where = artifact.spec, f"{path}.artifacts[{i}].spec"
        _require(spec.name == name, where, f"the spec is of the stage {spec.name!r:.60}")
        for kind, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs)):
            names = [tensor.name for tensor in tensors]
            _require(len(set(names)) == len(names) > 0, f"{where}.{kind}", "names are missing or not unique")
            for tensor in tensors:
                _check_shape(tensor, f"{where}.{kind}.{tensor.name}")
        for dimension, bounds in spec.profile.items():
            most = MAX_BATCH if dimension == BATCH else MAX_DIMENSION
            _check_range(bounds, most, f"{where}.profile.{dimension}")
        known = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
        if lacking := sorted(known - spec.profile.keys()):
            raise Mismatch(f"{where}.profile: there is no range of {lacking[0]!r:.60}")


def _check_shape(tensor: TensorSpec, path: str) -> None:
    _require(len(tensor.shape) <= MAX_RANK, path, f"there are {len(tensor.shape)} dimensions")
    for size in tensor.shape:
        if isinstance(size, int):
            _between(size, 0, MAX_DIMENSION, path)


def _check_range(bounds: Range, most: int, path: str) -> None:
    low, middle, high, step = bounds.min, bounds.opt, bounds.max, bounds.multiple_of
    ordered = 1 <= low <= middle <= high <= most
    _require(ordered, path, f"min {low}, opt {middle}, max {high} do not ascend from 1 to at most {most}")
    fits = step >= 1 and not any(value % step for value in (low, middle, high))
    _require(fits, path, f"min {low}, opt {middle}, max {high} are not multiples of {step}")


def _check_file(ref: FileRef) -> None:
    path = f"{ref.path!r:.80}"
    _require(ref.size_bytes >= 0, path, f"a file cannot have {ref.size_bytes} bytes")
    _require(
        re.fullmatch("[0-9a-f]{64}", ref.sha256) is not None, path, "its hash is no SHA-256 in hexadecimal"
    )


def _check_scheduler(params: SchedulerParams, path: str) -> None:
    _between(params.num_train_timesteps, 1, 10**6, f"{path}.num_train_timesteps")
    _between(params.shift, 1e-3, 1e3, f"{path}.shift")
    _between(params.timestep_scale, 1e-6, 1e6, f"{path}.timestep_scale")
    _between(params.solver_order, 1, 3, f"{path}.solver_order")
    _between(params.sigma_max, 0, 1e3, f"{path}.sigma_max")
    _between(params.sigma_min, 0, params.sigma_max, f"{path}.sigma_min")
    _require(
        params.shift_terminal is None or 0 <= params.shift_terminal < 1,
        f"{path}.shift_terminal",
        "not in [0, 1)",
    )
    if params.use_dynamic_shifting:
        low, high = params.base_image_seq_len, params.max_image_seq_len
        _require(
            0 < low < high <= MAX_DIMENSION, f"{path}.max_image_seq_len", f"{low} and {high} do not ascend"
        )
    if params.spacing is not Spacing.UNIFORM:
        low = params.sigma_min if params.spacing_min is None else params.spacing_min
        high = params.sigma_max if params.spacing_max is None else params.spacing_max
        _require(
            0 < low <= high <= 1e4, f"{path}.spacing_min", f"{low} and {high} do not ascend from above 0"
        )


def _check_golden_table(table: GoldenTable, params: SchedulerParams, path: str) -> None:
    steps = table.num_inference_steps
    _between(steps, 1, MAX_STEPS, f"{path}.num_inference_steps")
    runs = len(table.timesteps)
    _between(runs, 1, 2 * steps, f"the number of {path}.timesteps")
    _require(
        len(table.coefficients) == runs,
        f"{path}.coefficients",
        f"{len(table.coefficients)} rows for {runs} timesteps",
    )
    columns = len(coefficient_columns(history_length(params), draws_noise(params)))
    lengths = sorted({len(row) for row in table.coefficients})
    _require(
        lengths == [columns], f"{path}.coefficients", f"rows of {lengths} values, where {columns} are needed"
    )


def _check_latents(latents: LatentSpec, path: str) -> None:
    _between(latents.channels, 1, 4096, f"{path}.channels")
    _between(latents.scale_factor, 1, 1024, f"{path}.scale_factor")
    _between(latents.patch_size, 1, 1024, f"{path}.patch_size")
    if latents.frames_per_cell is not None:
        _between(latents.frames_per_cell, 1, 1024, f"{path}.frames_per_cell")
    widths = [len(row) for row in latents.rgb]
    _require(
        widths in ([], [latents.channels + 1] * 3),
        f"{path}.rgb",
        f"rows of {widths} values are no 3x{latents.channels + 1} matrix",
    )


def _check_defaults(defaults: Defaults, latents: LatentSpec, path: str) -> None:
    for side in ("height", "width"):
        _between(getattr(defaults, side), 1, MAX_SIDE, f"{path}.{side}")
    _check_frames(defaults, latents, path)
    values = math.prod(latents.shape(defaults.height, defaults.width, defaults.frames))
    _require(values <= MAX_VALUES, path, f"{defaults.height}x{defaults.width} takes {values} latent values")
    for size in defaults.bins:
        _between(min(size), 1, MAX_SIDE, f"{path}.bins")
        _between(max(size), 1, MAX_SIDE, f"{path}.bins")
    _between(defaults.num_inference_steps, 1, MAX_STEPS, f"{path}.num_inference_steps")
    _between(defaults.guidance_scale, -LARGEST_NUMBER, LARGEST_NUMBER, f"{path}.guidance_scale")
    if (tiling := defaults.tiling) is not None:
        _between(tiling.tile, latents.scale_factor, MAX_SIDE, f"{path}.tiling.tile")
        _between(tiling.stride, latents.scale_factor, tiling.tile, f"{path}.tiling.stride")
        whole = not (tiling.tile % latents.scale_factor or tiling.stride % latents.scale_factor)
        _require(whole, f"{path}.tiling", f"they are no multiples of {latents.scale_factor} pixels")
    if (skip := defaults.skip_layer_guidance) is not None:
        where = f"{path}.skip_layer_guidance"
        _between(skip.scale, -LARGEST_NUMBER, LARGEST_NUMBER, f"{where}.scale")
        _between(skip.start, 0, LARGEST_NUMBER, f"{where}.start")
        _between(skip.stop, 0, LARGEST_NUMBER, f"{where}.stop")
        _require(bool(skip.layers) and min(skip.layers) >= 0, f"{where}.layers", f"{list(skip.layers)}")
    if (pag := defaults.perturbed_attention_guidance) is not None:
        where = f"{path}.perturbed_attention_guidance"
        _between(pag.scale, 0, LARGEST_NUMBER, f"{where}.scale")
        _between(pag.adaptive_scale, 0, LARGEST_NUMBER, f"{where}.adaptive_scale")
        _require(bool(pag.layers) and min(pag.layers) >= 0, f"{where}.layers", f"{list(pag.layers)}")
        _require(skip is None, where, "it stands beside skip_layer_guidance, but a denoiser has one gate")


def _check_frames(defaults: Defaults, latents: LatentSpec, path: str) -> None:
    for name, most in (("frames", MAX_FRAMES), ("fps", MAX_FPS)):
        value = getattr(defaults, name)
        given = value is not None
        _require(given == latents.has_frames, f"{path}.{name}", f"{value} does not fit the latents' axes")
        if given:
            _between(value, 1, most, f"{path}.{name}")
    if defaults.frames is not None and latents.frames_per_cell is not None:
        rest = (defaults.frames - 1) % latents.frames_per_cell
        _require(rest == 0, f"{path}.frames", f"{defaults.frames} is not 1 + k * {latents.frames_per_cell}")


def _check_text(manifest: Manifest) -> None:
    _between(len(manifest.text), 1, MAX_ENCODERS, "$.text")
    for i, spec in enumerate(manifest.text):
        _check_lengths(spec, f"$.text[{i}]")


def _check_lengths(spec: TextSpec, path: str) -> None:
    for name in ("length", "max_length", "negative_max_length"):
        _between(getattr(spec, name), 1, MAX_TOKENS, f"{path}.{name}")
    for name, select in (("select", spec.select), ("negative_select", spec.negative_select)):
        if select is not None:
            _between(select.first, 0, spec.length, f"{path}.{name}.first")
            _between(select.last, 0, spec.length, f"{path}.{name}.last")
    for name in ("prefix", "negative_prefix", "suffix", "motion"):
        _between(len(getattr(spec, name) or ""), 0, MAX_PREFIX, f"the number of characters of {path}.{name}")
    rows = MAX_DIMENSION if spec.vocab_size is None else spec.vocab_size
    _between(rows, 1, MAX_DIMENSION, f"{path}.vocab_size")
    _between(spec.pad_token_id, 0, rows - 1, f"{path}.pad_token_id")


def _check_links(manifest: Manifest) -> None:
    """Check that what one stage reads is what another one, the text data or the loop gives it."""
    encoded = {spec.mask for spec in manifest.text if spec.mask is not None}
    for i, text in enumerate(manifest.text):
        for spec in _specs(manifest, text.stage, f"$.text[{i}].stage"):
            _check_known(spec, spec.inputs, TokenBatch.__slots__)
            for tensor in spec.inputs:  # (B,S)
                _require(len(tensor.shape) == 2, f"$.stages.{spec.name}", f"{tensor.name} is {tensor.shape}")
            encoded |= {tensor.name for tensor in spec.outputs}
    merged: set[str] = set()
    for spec in _specs(manifest, CONDITIONER):
        _check_known(spec, spec.inputs, encoded)
        merged |= {tensor.name for tensor in spec.outputs}
    residuals = _check_control(manifest, encoded, merged)
    _check_padding(manifest)
    for spec in _specs(manifest, DENOISER):
        _check_step(spec, manifest, merged | residuals)
    if manifest.latents.has_frames:
        _check_video_decoder(manifest)
        return
    for spec in _specs(manifest, VAE_DECODER):
        shapes = [tensor.shape for tensor in (*spec.inputs, *spec.outputs)]
        pictures = [len(shape) == 4 and shape[1] for shape in shapes]
        _require(
            pictures == [manifest.latents.channels, 3] and {HEIGHT, WIDTH} <= spec.profile.keys(),
            f"$.stages.{spec.name}",
            f"it does not turn latents of {manifest.latents.channels} channels into pictures of 3",
        )


def _check_padding(manifest: Manifest) -> None:
    """Check that `padding` has a value for every tensor of a text's conditioning that grows with the text."""
    stages = [name for name in (CONDITIONER, CONTROL_CONDITIONER) if name in manifest.stages]
    outputs = [tensor for stage in stages for spec in _specs(manifest, stage) for tensor in spec.outputs]
    grows = {tensor.name for tensor in outputs if TEXT_LENGTH in tensor.shape}
    for i, text in enumerate(manifest.text):
        if text.padding is None:
            continue
        path, values = f"$.text[{i}].padding", dict(text.padding)
        _require(len(manifest.text) == 1, path, "there are several text encoders")
        _require(
            values.keys() == grows,
            path,
            f"it is for {', '.join(values)}, but {', '.join(sorted(grows))} grow with the text",
        )
        wide = {tensor.name for tensor in outputs if tensor.dtype is DType.FLOAT32}
        for name, value in values.items():  # 16-bit values are arrays of their bits
            _require(value == 0 or name in wide, path, f"{name} is not float32, so its value must be 0")


def _check_video_decoder(manifest: Manifest) -> None:
    """Check the stage that decodes a whole video, or the two of the first latent frame and of every other one."""
    channels, per_cell = manifest.latents.channels, manifest.latents.frames_per_cell
    if VAE_DECODER_NEXT not in manifest.stages:
        _require(
            manifest.defaults.tiling is None, "$.defaults.tiling", "a video decoded as a whole has no tiles"
        )
        of_video = ((BATCH, channels, *VIDEO_AXES), (BATCH, 3, VIDEO_FRAMES, IMAGE_HEIGHT, IMAGE_WIDTH))
        for spec in _specs(manifest, VAE_DECODER):
            found = tuple(x.shape for x in (*spec.inputs, *spec.outputs))
            _require(
                found == of_video
                and spec.inputs[0].name == LATENTS
                and set(VIDEO_AXES) <= spec.profile.keys(),
                f"$.stages.{VAE_DECODER}",
                f"it does not turn latents of {channels} channels into a video of 3, and there is no "
                f"{VAE_DECODER_NEXT}",
            )
        return
    kept: set[tuple[tuple[int | str, ...], ...]] = set()
    for stage, frames in ((VAE_DECODER, 1), (VAE_DECODER_NEXT, per_cell)):
        for spec in _specs(manifest, stage):
            path = f"$.stages.{stage}"
            taken = [x.shape for x in spec.inputs[1:] if x.name.startswith(KEPT)]
            prefix = KEPT if stage == VAE_DECODER else NEXT_KEPT
            given = [x.shape for i, x in enumerate(spec.outputs[1:]) if x.name == f"{prefix}{i}"]
            names = [x.name for x in spec.inputs] == [LATENTS, *(f"{KEPT}{i}" for i in range(len(taken)))]
            whole = names and len(given) == len(spec.outputs) - 1
            wanted = given if stage == VAE_DECODER_NEXT else []
            _require(whole and taken == wanted, path, "it does not hand on what the next frame needs")
            kept.add(tuple(given))
            shapes = (spec.inputs[0].shape, spec.outputs[0].shape)
            right = ((BATCH, channels, 1, HEIGHT, WIDTH), (BATCH, 3, frames, IMAGE_HEIGHT, IMAGE_WIDTH))
            _require(
                shapes == right and {HEIGHT, WIDTH} <= spec.profile.keys(),
                path,
                f"it turns {shapes[0]} into {shapes[1]}, not a latent frame into {frames} frames",
            )
    _require(len(kept) == 1, f"$.stages.{VAE_DECODER_NEXT}", f"it does not take what {VAE_DECODER} hands on")


def _check_control(manifest: Manifest, encoded: set[str], merged: set[str]) -> set[str]:
    """Check the ControlNet, if there is one. Returns the names of its outputs."""
    texts, residuals = set(merged), set[str]()
    if CONTROL_CONDITIONER in manifest.stages:
        for spec in (*_specs(manifest, CONTROLNET), *_specs(manifest, CONTROL_CONDITIONER)):
            if spec.name == CONTROL_CONDITIONER:
                _check_known(spec, spec.inputs, encoded)
                texts |= {tensor.name for tensor in spec.outputs}
    if CONTROLNET in manifest.stages:
        step = {LATENTS, ROW_OF, TIMESTEP, COEFFICIENTS, CONTROL_LATENTS, CONTROL_SCALE}
        for spec in _specs(manifest, CONTROLNET):
            _check_known(spec, spec.inputs, texts | step)
            names = {tensor.name for tensor in spec.inputs}
            _require(step <= names, f"$.stages.{spec.name}", f"it lacks {sorted(step - names)}")
            residuals |= {tensor.name for tensor in spec.outputs}
    return {name for name in residuals if name.startswith(CONTROL_RESIDUAL)}


def _specs(manifest: Manifest, stage: str, path: str = "$.stages") -> Iterable[StageSpec]:
    _require(stage in manifest.stages, path, f"there is no stage {stage!r:.60}")
    return [artifact.spec for artifact in manifest.stages[stage].artifacts]


def _check_known(spec: StageSpec, tensors: Iterable[TensorSpec], known: Iterable[str]) -> None:
    for tensor in tensors:
        _require(tensor.name in known, f"$.stages.{spec.name}", f"nothing gives it {tensor.name!r:.60}")


def _check_step(spec: StageSpec, manifest: Manifest, conditioning: set[str]) -> None:
    """Check a denoiser against the contract of a step."""
    path, channels = f"$.stages.{spec.name}", manifest.latents.channels
    axes = manifest.latents.axes
    rank = 3 + len(axes)
    history = [tensor.shape for tensor in spec.inputs if tensor.name == HISTORY]
    _require(
        len(history) == 1 and len(history[0]) == rank,
        path,
        f"there is no input {HISTORY} of {rank} dimensions",
    )
    length = history[0][1]
    _require(isinstance(length, int) and length <= MAX_RANK, path, f"{HISTORY} holds {length!r:.60} states")
    contract = manifest.step_contract(spec)
    inputs, outputs = contract.inputs(channels, (), axes), contract.outputs(channels, axes)
    for wanted, found in ((inputs, spec.inputs), (outputs, spec.outputs)):
        by_name = {tensor.name: tensor for tensor in found}
        for tensor in wanted:
            got = by_name.get(tensor.name)
            _require(got == tensor, path, f"{tensor.name} must be {tensor.shape}, but is {got and got.shape}")
    own = {tensor.name for tensor in inputs}
    _check_known(spec, (tensor for tensor in spec.inputs if tensor.name not in own), conditioning)
