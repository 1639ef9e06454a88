"""A checkpoint with LoRAs in its weights: each changed tensor is computed when it is read, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from ditc.export.checkpoint.open import Checkpoint, Component
from ditc.export.checkpoint.tensors import TensorEntry, TensorSource
from ditc.runtime.bundle.manifest import FoldedLora
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.lora import Change, ScaledLora, changed, changes_of
from ditc.runtime.lora.lora_file import read_lora
from ditc.runtime.lora.names import KnownWeights, resolved
from ditc.runtime.weight_map import NativeName


def read_choices(
    choices: Sequence[LoraChoice], checkpoint: Checkpoint, native: Mapping[str, NativeName]
) -> tuple[ScaledLora, ...]:
    """The LoRAs of the files, under the names of the checkpoint's tensors.

    Args:
        native: where the family's own files hold the transformer's tensors (`Family.native_names`).

    Raises:
        UsageError: a file is no LoRA, or does not fit the checkpoint; the message names the key.
    """
    files = [(read_lora(choice.file), choice.scale) for choice in choices]
    shapes = {
        name: {tensor: component.tensors.shape(tensor) for tensor in component.tensors}
        for name, component in (checkpoint.components.items() if files else ())
    }
    known = KnownWeights(shapes, native)
    return tuple(ScaledLora(resolved(file, known), scale) for file, scale in files)


def with_loras(checkpoint: Checkpoint, loras: Sequence[ScaledLora]) -> Checkpoint:
    """The checkpoint with the changes of the LoRAs, which fit it, added to its weights, in fp32, in their order."""
    if not loras:
        return checkpoint
    components = checkpoint.components
    folded = tuple(
        FoldedLora(
            file=scaled.lora.name,
            sha256=scaled.lora.sha256,
            scale=float(scaled.scale),
            components=tuple(sorted(scaled.lora.components)),
        )
        for scaled in loras
    )
    return replace(
        checkpoint,
        components={name: _folded(component, loras) for name, component in components.items()},
        loras=(*checkpoint.loras, *folded),
    )


def _folded(component: Component, loras: Sequence[ScaledLora]) -> Component:
    changes = changes_of(loras, component.name)
    if not changes:
        return component
    entries = {name: component.tensors.entry(name) for name in component.tensors}
    return replace(component, tensors=TensorSource(entries | _changed(entries, changes)))


def _changed(entries: dict[str, TensorEntry], changes: dict[str, list[Change]]) -> dict[str, TensorEntry]:
    return {
        name: TensorEntry(entries[name].shape, torch.float32, partial(_load, entries[name], parts))
        for name, parts in changes.items()
    }


def _load(entry: TensorEntry, changes: list[Change]) -> torch.Tensor:
    return torch.from_numpy(changed(entry.load().float().numpy(), changes))
