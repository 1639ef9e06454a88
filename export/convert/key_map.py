"""One tensor made of others without reading any: split, joined, halves swapped, reshaped; and names held to a table."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ditc.export.checkpoint.tensors import TensorEntry
from ditc.runtime.errors import CheckpointError

SHOWN = 4


def split(name: str, whole: TensorEntry, parts: int) -> list[TensorEntry]:
    """Equal parts along the first dimension. Raises CheckpointError."""
    if parts == 1:
        return [whole]
    if not whole.shape or whole.shape[0] % parts:
        raise CheckpointError(f"{name} has shape {list(whole.shape)}, which {parts} projections cannot share")
    shape = (whole.shape[0] // parts, *whole.shape[1:])

    def part(index: int) -> TensorEntry:
        return TensorEntry(shape, whole.dtype, lambda: whole.load().chunk(parts)[index])

    return [part(index) for index in range(parts)]


def joined(parts: Sequence[TensorEntry]) -> TensorEntry:
    """Concatenated along the first dimension."""
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return TensorEntry(shape, parts[0].dtype, lambda: torch.cat([part.load() for part in parts]))


def swapped(name: str, whole: TensorEntry) -> TensorEntry:
    """The second half first; its own inverse. Raises CheckpointError."""
    first, second = split(name, whole, 2)
    return joined([second, first])


def reshaped(whole: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    """The same values in row-major order."""
    return TensorEntry(shape, whole.dtype, lambda: whole.load().reshape(shape))


def check_names(found: Collection[str], wanted: Collection[str], *, hint: str) -> None:
    """Refuse tensors that are missing or unknown. Raises CheckpointError."""
    for names, what in ((set(wanted) - set(found), "missing"), (set(found) - set(wanted), "unknown")):
        if names:
            some = ", ".join(sorted(names)[:SHOWN])
            raise CheckpointError(f"{len(names)} tensors are {what}: {some}", hint=hint)
