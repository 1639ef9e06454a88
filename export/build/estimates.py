"""Estimate the memory and disk that a build needs. `ditc build` prints the estimate beside the measured peak."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ditc.export.build.golden import golden_sizes
from ditc.export.checkpoint.open import Component
from ditc.export.contract import StageModule
from ditc.export.graph.onnx import can_check, check_sizes
from ditc.runtime.errors import BuildError
from ditc.runtime.spec import Precision, StageSpec
from ditc.runtime.step_contract import BATCH, FRAMES, HEIGHT, IMAGE_HEIGHT, SIDES, VIDEO_FRAMES

ITEM_BYTES = {Precision.FP32: 4, Precision.TF32: 4, Precision.FP16: 2, Precision.BF16: 2}

# Peak resident size of a process that builds one stage, fitted to benchmarks/results/build_memory-*.json.
FIXED_BYTES = 700_000_000  # torch, diffusers and transformers
# ONNX Runtime's copy of the weights in fp32, packed for its kernels. It packs convolutions beside the mapped file.
PACKED_PER_WEIGHT_BYTE, PACKED_CONVOLUTIONS_PER_WEIGHT_BYTE = 1.05, 2.0
LEFT_BY_CHECK_BYTES = 60_000_000
# Writing a graph whose weights stay mapped from an fp32 checkpoint: copies of those that it holds transposed.
TRANSPOSED_PER_MAPPED_BYTE, WRITING_BYTES = 0.15, 60_000_000
# A denoiser's activations, by the bytes of its weights in fp32: both grow with the network's width.
DENOISER_PER_WEIGHT_BYTE = 0.2
# An autoencoder's activations while ONNX Runtime computes a picture for the check. Those of PyTorch, for the golden
# file, depend on the direction: a decoder begins its last level with twice the channels.
CHECK_BYTES_PER_PIXEL = 3600
DECODER_BYTES_PER_PIXEL, ENCODER_BYTES_PER_PIXEL = 4150, 3400


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSize:
    """What decides how much memory the build of one stage needs.

    Attributes:
        weight_bytes: the weights as the stage is deployed. They are mapped from the checkpoint's files or, in another
            type, copied, and then the files' pages are released.
        parameters: their number.
        checked: whether the graph is run after its export.
        encoder, denoiser: whether the stage takes pictures, and whether it works on latents alone.
        check_pixels, golden_pixels: pixels of the largest picture that is computed for the check, and for the golden
            file; 0 for a stage without pictures.
    """

    weight_bytes: int
    parameters: int
    checked: bool
    encoder: bool
    denoiser: bool
    check_pixels: int
    golden_pixels: int


def stage_size(stage: StageModule, scale: int, frames_per_cell: int = 1) -> StageSize:
    """The size of a stage. Its weights may be on torch's meta device.

    Args:
        scale: pixels per latent cell.
        frames_per_cell: frames of a video per latent frame.
    """
    tensors = stage.module.state_dict().values()
    pixels = _pixels(stage.spec, golden_sizes(stage.spec), scale, frames_per_cell)
    return StageSize(
        weight_bytes=sum(t.numel() * t.dtype.itemsize for t in tensors),
        parameters=sum(t.numel() for t in tensors),
        checked=can_check(stage),
        encoder=any(IMAGE_HEIGHT in tensor.shape for tensor in stage.spec.inputs),
        denoiser=HEIGHT in stage.spec.profile and not pixels,
        check_pixels=max(
            _pixels(stage.spec, sizes, scale, frames_per_cell) for sizes in check_sizes(stage.spec)
        ),
        golden_pixels=pixels,
    )


def build_bytes(size: StageSize) -> int:
    """Estimate the peak resident size of the process while it builds a stage: its graph and its golden file."""
    return max(export_bytes(size), golden_bytes(size))


def export_bytes(size: StageSize) -> int:
    """Estimate the peak while the stage's graph is exported and checked."""
    loaded = FIXED_BYTES + size.weight_bytes
    if not size.checked:
        mapped = size.weight_bytes if size.weight_bytes >= size.parameters * 4 else 0
        return loaded + WRITING_BYTES + round(TRANSPOSED_PER_MAPPED_BYTE * mapped)
    packed = PACKED_CONVOLUTIONS_PER_WEIGHT_BYTE if size.check_pixels else PACKED_PER_WEIGHT_BYTE
    packed += DENOISER_PER_WEIGHT_BYTE if size.denoiser else 0
    return loaded + round(packed * size.parameters * 4) + CHECK_BYTES_PER_PIXEL * size.check_pixels


def golden_bytes(size: StageSize) -> int:
    """Estimate the peak while the stage's golden file is computed, with the weights in fp32."""
    pixel = ENCODER_BYTES_PER_PIXEL if size.encoder else DECODER_BYTES_PER_PIXEL
    left = LEFT_BY_CHECK_BYTES if size.checked else 0
    weights = size.parameters * 4 * (1 + DENOISER_PER_WEIGHT_BYTE if size.denoiser else 1)
    return FIXED_BYTES + left + round(weights) + pixel * size.golden_pixels


def _pixels(spec: StageSpec, sizes: Mapping[str, int], scale: int, frames_per_cell: int) -> int:
    """Pixels of all pictures that the stage takes or gives at these sizes; 0 if it has none."""
    pictures = [tensor.shape for tensor in (*spec.inputs, *spec.outputs) if IMAGE_HEIGHT in tensor.shape]
    if not pictures:
        return 0
    frames = [size for size in pictures[0][2:] if isinstance(size, int)]  # of a video's decoder
    if VIDEO_FRAMES in pictures[0]:
        frames = [sizes[FRAMES] * frames_per_cell]
    sides = [sizes[name] * (1 if IMAGE_HEIGHT in sizes else scale) for name in SIDES if name in sizes]
    return sizes[BATCH] * math.prod((*sides, *frames))


def weight_bytes(components: Iterable[Component], precision: Precision) -> int:
    """Size of all tensors of the components in a precision. For an 8-bit denoiser, give its base precision."""
    item = ITEM_BYTES[precision]
    return sum(math.prod(c.tensors.shape(name)) * item for c in components for name in c.tensors)


def check_disk(out: Path, stages: Collection[tuple[str, int]], *, engines: bool) -> None:
    """Refuse a build that the disk cannot hold.

    Args:
        stages: name and bytes of weights of each stage that will be written.
        engines: whether engines are built too. Each holds the weights of its stage a second time.

    Raises:
        BuildError: the disk has less free space than the build needs.
    """
    needed = sum(size for _, size in stages) * (2 if engines else 1)
    free = shutil.disk_usage(out).free
    if free < needed:
        largest, size = max(stages, key=lambda stage: stage[1])
        raise BuildError(
            f"{out} has {free / 1e6:.1f} MB free, but the build needs about {needed / 1e6:.1f} MB "
            f"({largest} alone {size / 1e6:.1f} MB)",
            hint="free some space, or choose another -o directory",
        )


def available_memory_bytes() -> int:
    """Memory that can be allocated without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def resident_bytes() -> int:
    """Resident size of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)
