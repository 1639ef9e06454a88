"""The toy family's own files: one tensor, whose name differs from that in its diffusers directory."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.tensors import TensorSource
from ditc.export.convert.layout import NativeLayout, NativeOptions
from ditc.export.convert.new_directory import write_json
from ditc.export.convert.writer import write_weights
from toy_family.adapter import CLASS_NAME

NATIVE, DIFFUSERS = "toy.w", "toys.0.weight"


class ToyLayout:
    """One tensor each way."""

    needed: Collection[str] = ()

    def recognises(self, names: Collection[str]) -> bool:
        return NATIVE in names

    def write_directory(
        self,
        native: TensorSource,
        directory: Path,
        *,
        options: NativeOptions,
        base: Checkpoint | None,
        max_shard_bytes: int,
    ) -> None:
        renamed = TensorSource({DIFFUSERS: native.entry(NATIVE)})
        write_weights(renamed, directory / "transformer", max_shard_bytes=max_shard_bytes)
        write_json(directory / "transformer" / "config.json", {"_class_name": CLASS_NAME})
        write_json(directory / "model_index.json", {"transformer": ["diffusers", CLASS_NAME]})

    def to_native(self, checkpoint: Checkpoint) -> TensorSource:
        return TensorSource({NATIVE: checkpoint.component("transformer").tensors.entry(DIFFUSERS)})


LAYOUT: NativeLayout = ToyLayout()
