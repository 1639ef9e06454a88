"""What `ditc convert` needs from a family with its own file layout, and which options its user gives."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.tensors import TensorSource

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeOptions:
    """Facts that the tensors of a native file may not tell. Each family says which of them it needs.

    Attributes:
        resolution: side of the pictures that the network was trained for, in pixels.
        flow_shift: the sampler's shift of the sigmas.
        position_embedding: "none" or "sincos".
        interpolation_scale: scale of the "sincos" position embedding.
        dtype: element type to write, a key of DTYPES.
        attention_head_dim, cross_attention_head_dim: width of a head, for a network that is not a release.
    """

    resolution: int | None = None
    flow_shift: float | None = None
    position_embedding: str | None = None
    interpolation_scale: float | None = None
    dtype: str | None = None
    attention_head_dim: int | None = None
    cross_attention_head_dim: int | None = None


class NativeLayout(Protocol):
    """One family's own file layout: `LAYOUT` in the family's convert.py.

    Attributes:
        needed: the components, besides transformer and scheduler, without which no bundle can be built.
    """

    needed: Collection[str]

    def recognises(self, names: Collection[str]) -> bool:
        """Whether a file with tensors of these names belongs to the family, even if it cannot be converted."""
        ...

    def write_directory(
        self,
        native: TensorSource,
        directory: Path,
        *,
        options: NativeOptions,
        base: Checkpoint | None,
        max_shard_bytes: int,
    ) -> None:
        """Write a diffusers directory: networks and scheduler from the file, other components copied from `base`.

        Args:
            native: the file's tensors, by their native names.
            base: None to leave out what the file does not hold.
            max_shard_bytes: largest size of a weight file, in bytes.

        Raises:
            UsageError: an option is missing, or the family does not have it.
            CheckpointError: the file is damaged or has wrong shapes, or a value does not fit the element type.
        """
        ...

    def to_native(self, checkpoint: Checkpoint) -> TensorSource:
        """The checkpoint's weights under the family's own names. Raises CheckpointError for an unknown tensor."""
        ...
