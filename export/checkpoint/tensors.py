"""Named tensors that stay on disk until they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ditc.export.checkpoint.file_content import check_content
from ditc.runtime.errors import CheckpointError

# Element types by their names in the safetensors format (its README, section "Format"; F8_* since version 0.4).
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Shape and element type of one tensor, and a function that loads its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def size_bytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


class TensorSource(Mapping[str, torch.Tensor]):
    """Tensors by name. A look-up maps the tensor's bytes from the file; nothing is cached or held twice.

    The tensors of a file are private memory maps. Treat them as read-only: `.clone()` a tensor before writing to it.
    """

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._entries[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Shape, element type and loader of one tensor; its values are not read. Raises KeyError."""
        return self._entries[name]

    def headers(self) -> TensorSource:
        """The same names, shapes and element types without values: the tensors are on torch's meta device."""
        return TensorSource(
            {
                name: replace(entry, load=partial(torch.empty, entry.shape, dtype=entry.dtype, device="meta"))
                for name, entry in self._entries.items()
            }
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the file's header. Raises KeyError."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Element type of one tensor, from the file's header. Raises KeyError."""
        return self._entries[name].dtype

    @property
    def size_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.size_bytes for entry in self._entries.values())


def read_safetensors(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of one safetensors file; values are read when they are used.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors, or has an element type that is not in
            TORCH_DTYPES.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", hint="fetch the file again, or check the path")
    try:
        file: Any = safe_open(path, framework="pt")  # untyped in safetensors 0.8
    except (SafetensorError, OSError) as error:
        check_content(path)
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}",
            hint=f"the file has {path.stat().st_size} bytes: the download was cut off, or the file has another format; "
            "fetch it again",
        ) from error
    return {name: _entry(path, file, name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)


def _entry(path: Path, file: Any, name: str) -> TensorEntry:
    view = file.get_slice(name)
    dtype = TORCH_DTYPES.get(view.get_dtype())
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} has element type {view.get_dtype()}, which ditc does not read",
            hint=f"the known types are {', '.join(TORCH_DTYPES)}",
        )
    return TensorEntry(tuple(view.get_shape()), dtype, lambda: file.get_tensor(name))
