"""Inputs that a stage is exported and checked with: a size for every named dimension, and plausible values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ditc.runtime import step_contract
from ditc.runtime.session import Array, numpy_dtype
from ditc.runtime.spec import DType, StageSpec, TensorSpec


def example_sizes(spec: StageSpec, *, second: bool = False, most: int | None = None) -> dict[str, int]:
    """A size for every named dimension inside its range; `second` differs from the first wherever the range allows.

    They start at 2, even where the profile ends at 1: torch.export specialises sizes 0 and 1, and the graph is the
    same for all sizes.

    Args:
        most: at most so many times what the dimension is a multiple of, where its range allows; None: the likely size.
    """
    sizes = {}
    for index, (name, bounds) in enumerate(spec.profile.items()):
        step = bounds.multiple_of
        likely = min(bounds.opt, bounds.max, *([] if most is None else [most * step]))
        size = max(likely, bounds.min, 2 * step)
        size -= size % step
        if second:
            larger, smaller = size + step * (index + 1), size - step
            size = larger if larger <= bounds.max else max(smaller, bounds.min)
        sizes[name] = size
    return _rows_unlike_batch(sizes)


def example_feeds(
    spec: StageSpec, sizes: Mapping[str, int], *, seed: int = 0, integers: Mapping[str, int] | None = None
) -> dict[str, Array]:
    """Seeded inputs with plausible values: masks of ones with a padded tail, rows spread over the samples."""
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
    if "mask" in tensor.name:
        mask = np.ones(shape, np.int64)
        mask[..., -max(1, shape[-1] // 4) :] = 0
        return mask.astype(numpy_dtype(tensor.dtype))
    if tensor.dtype is DType.INT64:
        return rng.integers(0, integers.get(tensor.name, 2), shape)
    values = rng.standard_normal(shape, np.float32)
    return _as_bits(values) if tensor.dtype is DType.BFLOAT16 else values.astype(numpy_dtype(tensor.dtype))


def _as_bits(values: Array) -> Array:
    """fp32 to bf16 bits, rounding to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _rows_unlike_batch(sizes: dict[str, int]) -> dict[str, int]:
    rows, batch = step_contract.ROWS, step_contract.BATCH
    if rows in sizes and sizes[rows] == sizes.get(batch):
        sizes[rows] += 1
    return sizes
