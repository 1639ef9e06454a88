"""Derive tensors from others without reading values: split, join, swap halves, reshape; and check tensor names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from ditc.export.checkpoint.tensors import TensorEntry
from ditc.runtime.errors import CheckpointError
from ditc.runtime.weight_map import NativeName

SHOWN = 4


def split(name: str, whole: TensorEntry, parts: int) -> list[TensorEntry]:
    """Split a tensor into equal parts along its first dimension. Raises CheckpointError if that is impossible."""
    if parts == 1:
        return [whole]
    if not whole.shape or whole.shape[0] % parts:
        raise CheckpointError(
            f"{name} has shape {list(whole.shape)}, whose first dimension cannot be split into {parts} equal parts",
            hint="the file is damaged, or is not of the family that its tensors' names suggest",
        )
    shape = (whole.shape[0] // parts, *whole.shape[1:])

    def part(index: int) -> TensorEntry:
        return TensorEntry(shape, whole.dtype, lambda: whole.load().chunk(parts)[index])

    return [part(index) for index in range(parts)]


def joined(parts: Sequence[TensorEntry]) -> TensorEntry:
    """Concatenate tensors along the first dimension."""
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return TensorEntry(shape, parts[0].dtype, lambda: torch.cat([part.load() for part in parts]))


def swapped(name: str, whole: TensorEntry) -> TensorEntry:
    """Exchange the two halves of the first dimension. Raises CheckpointError if its size is odd."""
    first, second = split(name, whole, 2)
    return joined([second, first])


def reshaped(whole: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    """The same values in another shape, in row-major order."""
    return TensorEntry(shape, whole.dtype, lambda: whole.load().reshape(shape))


def native_names_of(
    rows: Mapping[str, Sequence[str]], swapped: Collection[str] = ()
) -> dict[str, NativeName]:
    """Where the family's own files hold each tensor of diffusers, by its name there.

    Args:
        rows: for the native name of every tensor, the names of the diffusers tensors that it holds, in their order.
        swapped: native names of tensors whose halves are exchanged.
    """
    return {
        name: NativeName(name=native, part=part, parts=len(names), swapped=native in swapped)
        for native, names in rows.items()
        for part, name in enumerate(names)
    }


def check_names(found: Collection[str], wanted: Collection[str], *, hint: str) -> None:
    """Raise CheckpointError, with this hint, if wanted tensors are missing or unknown ones are there."""
    for names, what in ((set(wanted) - set(found), "missing"), (set(found) - set(wanted), "unknown")):
        if names:
            some = ", ".join(sorted(names)[:SHOWN])
            raise CheckpointError(f"{len(names)} tensors are {what}: {some}", hint=hint)
