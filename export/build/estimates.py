"""Estimate the memory and disk that a build needs. `ditc build` prints the estimate beside the measured peak."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from ditc.export.checkpoint.open import Component
from ditc.export.graph.onnx import MOST_CHECKED_PARAMETERS
from ditc.runtime.errors import BuildError
from ditc.runtime.spec import Precision

ITEM_BYTES = {Precision.FP32: 4, Precision.TF32: 4, Precision.FP16: 2, Precision.BF16: 2}

# Peak resident size of a process that exports one stage. torch, diffusers and transformers alone take 0.7 GB. The
# weights are held once (Sana 1.6B in fp16: a peak of 3.4 GB for 3.2 GB of weights). A stage that is small enough to be
# checked by running its graph needs more: PyTorch's activations, and ONNX Runtime's packed copy (fp16 as fp32).
EXPORT_FIXED_BYTES = 900_000_000
BYTES_PER_CHECKED_WEIGHT_BYTE = 3.5
BYTES_PER_UNCHECKED_WEIGHT_BYTE = 1.0


def weight_bytes(components: Iterable[Component], precision: Precision) -> int:
    """Size of all tensors of the components in a precision. For an 8-bit denoiser, give its base precision."""
    item = ITEM_BYTES[precision]
    return sum(math.prod(c.tensors.shape(name)) * item for c in components for name in c.tensors)


def estimate_export_bytes(weights: int, precision: Precision) -> int:
    """Estimate the peak resident size of the process while it exports a stage.

    Args:
        weights: bytes of the stage's weights in `precision`.
    """
    limit = MOST_CHECKED_PARAMETERS.get(precision, 0) * ITEM_BYTES[precision]
    per_byte = BYTES_PER_CHECKED_WEIGHT_BYTE if weights <= limit else BYTES_PER_UNCHECKED_WEIGHT_BYTE
    return EXPORT_FIXED_BYTES + round(per_byte * weights)


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
