"""Example inputs for exporting and checking a stage: a size for every named dimension, and plausible values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ditc.runtime import step_contract
from ditc.runtime.session import Array, numpy_dtype
from ditc.runtime.spec import DType, StageSpec, TensorSpec


def example_sizes(
    spec: StageSpec, *, second: bool = False, max_multiple: int | None = None, max_side: int | None = None
) -> dict[str, int]:
    """Choose a size for every named dimension inside its range.

    Sizes start at 2, even where the range ends at 1, because torch.export specialises sizes 0 and 1. The graph is the
    same for all sizes.

    Args:
        second: choose other sizes, which differ from the first ones wherever the ranges allow.
        max_multiple: cap on each size, in multiples of the dimension's step (`Range.multiple_of`). The range's minimum
            takes precedence over the cap. None: the range's likely size (`Range.opt`).
        max_side: the same for heights and widths of pictures and latents, but without their ranges' minimum.
    """
    sizes = {}
    for index, (name, bounds) in enumerate(spec.profile.items()):
        step = bounds.multiple_of
        side = max_side is not None and name in step_contract.SIDES
        cap, least = (max_side, step) if side else (max_multiple, bounds.min)
        likely = min(bounds.opt, bounds.max, *([] if cap is None else [cap * step]))
        size = max(likely, least, 2 * step)
        size -= size % step
        if second:
            larger, smaller = size + step * (index + 1), size - step
            size = larger if larger <= bounds.max else max(smaller, least)
        sizes[name] = size
    return _rows_unlike_batch(sizes)


def example_feeds(
    spec: StageSpec, sizes: Mapping[str, int], *, seed: int = 0, integers: Mapping[str, int] | None = None
) -> dict[str, Array]:
    """Draw seeded inputs with plausible values: masks are ones with a padded tail, rows are spread over the samples.

    Args:
        integers: exclusive upper bound for each integer input; 2 for an input without one.
    """
    rng = np.random.default_rng(seed)
    return {tensor.name: _example(tensor, sizes, rng, integers or {}) for tensor in spec.inputs}


def shape_of(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The tensor's shape with every named dimension replaced by its size."""
    return tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape)


def _example(
    tensor: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator, integers: Mapping[str, int]
) -> Array:
    shape = shape_of(tensor, sizes)
    if tensor.name == step_contract.ROW_OF:
        return np.arange(shape[0], dtype=np.int64) % sizes[step_contract.BATCH]
    if tensor.name == step_contract.TIMESTEP:
        return rng.uniform(1, 999, shape).astype(np.float32)
    if tensor.name == step_contract.HELD:  # the first of several frames, in every other sample
        held = np.zeros(shape, np.float32)
        held[::2, : min(1, shape[1] - 1)] = 1
        return held
    if "mask" in tensor.name:
        mask = np.ones(shape, np.int64)
        mask[..., -max(1, shape[-1] // 4) :] = 0
        return mask.astype(numpy_dtype(tensor.dtype))
    if tensor.dtype is DType.INT64:
        return rng.integers(0, integers.get(tensor.name, 2), shape)
    values = rng.standard_normal(shape, np.float32)
    return (
        _bfloat16_bits(values) if tensor.dtype is DType.BFLOAT16 else values.astype(numpy_dtype(tensor.dtype))
    )


def _bfloat16_bits(values: Array) -> Array:
    """The values rounded to bf16, to nearest even, as bits."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _rows_unlike_batch(sizes: dict[str, int]) -> dict[str, int]:
    """Give rows and batch different sizes, so that a graph that confuses the two dimensions fails."""
    rows, batch = step_contract.ROWS, step_contract.BATCH
    if rows in sizes and sizes[rows] == sizes.get(batch):
        sizes[rows] += 1
    return sizes
