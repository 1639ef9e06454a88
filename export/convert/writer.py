"""Write tensors as safetensors, one shard at a time, so that memory holds at most one shard.

The folder that the shards are written to is itself written as a whole (`atomic_folder`), which syncs them to disk.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ditc.export.checkpoint.safetensors_file import safetensors_path
from ditc.export.checkpoint.tensors import TensorSource
from ditc.runtime.atomic import write_atomic
from ditc.runtime.errors import CheckpointError

# diffusers' default is 10 GB. Here a converted copy of the shard is in memory while it is written, so less is better.
MAX_SHARD_BYTES = 2 * 10**9


def write_weights(
    tensors: TensorSource,
    directory: Path,
    *,
    stem: str = "diffusion_pytorch_model",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[Path, ...]:
    """Write all tensors as one file, or as shards with an index. Returns the files.

    Args:
        stem: how the files' names begin.
        dtype: the type that floating-point tensors are cast to; None keeps their own types.
        max_shard_bytes: size in bytes at which a new shard begins; one larger tensor is a shard of its own.

    Raises:
        CheckpointError: a value that is finite in its own type is not finite in the new one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = _plan(tensors, dtype, max_shard_bytes)
    files = [directory / _shard_name(stem, index, len(shards)) for index in range(len(shards))]
    for path, names in zip(files, shards, strict=True):
        shard = {name: _cast(name, tensors[name], dtype) for name in names}
        with safetensors_path(path, durable=False) as partial:
            save_file(shard, partial, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: path.name for path, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": _total_bytes(tensors, dtype)}, "weight_map": weight_map}
        write_atomic(
            directory / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n", durable=False
        )
    return tuple(files)


def _plan(tensors: TensorSource, dtype: torch.dtype | None, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name in tensors:
        size_bytes = _size_bytes(tensors, name, dtype)
        if shards[-1] and filled_bytes + size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += size_bytes
    return shards


def _shard_name(stem: str, index: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor.contiguous()
    if tensor.dtype.itemsize == 1:
        # torch has no isfinite for 8-bit floats. It is not needed: every other type holds their values.
        return tensor.to(dtype)
    cast = tensor.to(dtype)
    lost = int((torch.isfinite(tensor) & ~torch.isfinite(cast)).sum())
    if lost:
        raise CheckpointError(
            f"{name} has {lost} values too large for {dtype}; the largest is {tensor.abs().max().item():g}",
            hint="convert to bf16 or fp32",
        )
    return cast


def _size_bytes(tensors: TensorSource, name: str, dtype: torch.dtype | None) -> int:
    entry = tensors.entry(name)
    if dtype is None or not entry.dtype.is_floating_point:
        return entry.size_bytes
    return entry.size_bytes // int(entry.dtype.itemsize) * int(dtype.itemsize)


def _total_bytes(tensors: TensorSource, dtype: torch.dtype | None) -> int:
    return sum(_size_bytes(tensors, name, dtype) for name in tensors)
