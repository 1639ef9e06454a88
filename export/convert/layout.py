"""What `ditc convert` asks of a family that has files of its own, and what it asks of its user."""

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
    """What the tensors of a native file may not tell; each family says which of them it needs.

    Attributes:
        resolution: pixels of a side that the network was trained for.
        flow_shift: of the sampler.
        position_embedding, interpolation_scale: "none" or "sincos", and the scale of the latter.
        dtype: element type to write, a key of DTYPES.
        attention_head_dim, cross_attention_head_dim: of a network that no release has.
    """

    resolution: int | None = None
    flow_shift: float | None = None
    position_embedding: str | None = None
    interpolation_scale: float | None = None
    dtype: str | None = None
    attention_head_dim: int | None = None
    cross_attention_head_dim: int | None = None


class NativeLayout(Protocol):
    """One family's own files: `LAYOUT` in its convert.py."""

    def recognises(self, names: Collection[str]) -> bool:
        """Whether a file with these tensors is the family's, also where it is one that cannot be converted."""
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
        """Write the file's networks and scheduler as a diffusers directory, and what it does not hold from base.

        Raises:
            UsageError: an option that is missing, or that the family does not have.
            CheckpointError: a damaged or misshapen file, or a value that the element type cannot hold.
        """
        ...

    def to_native(self, checkpoint: Checkpoint) -> TensorSource:
        """The checkpoint's weights under the family's own names. Raises CheckpointError: a foreign tensor."""
        ...
