"""Open a checkpoint: configs as data, weights as tensors that stay on disk until they are used.

A diffusers directory is a model_index.json that names components, one folder each:

    model_index.json    {"_class_name": "SanaPipeline", "transformer": ["diffusers", "Sana..."]}
    transformer/        config.json + diffusion_pytorch_model[.variant].safetensors, single or sharded
    scheduler/          scheduler_config.json
    tokenizer/          tokenizer.json
    ditc.json           optional: the checkpoint's own inference defaults
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditc.export.checkpoint.defaults import read_defaults
from ditc.export.checkpoint.hub import fetch_snapshot, is_hub_id
from ditc.export.checkpoint.json_files import read_json
from ditc.export.checkpoint.tensors import TensorSource
from ditc.export.checkpoint.weights import read_weights
from ditc.runtime.errors import CheckpointError

NATIVE_SUFFIXES = frozenset({".pth", ".pt", ".ckpt", ".safetensors"})


@dataclass(frozen=True, slots=True)
class Component:
    """One network of a checkpoint: its config, its weights, and the files the weights lie in."""

    name: str
    config: dict[str, Any]
    tensors: TensorSource
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that a diffusers directory says.

    Attributes:
        tokenizers: a component's name -> its folder.
        variant: whose weight files were taken, where a component has them.
    """

    path: Path
    model_index: dict[str, Any]
    components: dict[str, Component]
    scheduler_config: dict[str, Any]
    tokenizers: dict[str, Path]
    defaults: dict[str, Any]
    variant: str | None = None

    def component(self, name: str) -> Component:
        """The network of that name. Raises CheckpointError with the names there are."""
        if name not in self.components:
            raise CheckpointError(
                f"{self.path} has no component {name!r}, only {', '.join(sorted(self.components))}",
                hint="is this the checkpoint of another family?",
            )
        return self.components[name]


def open_checkpoint(source: str | Path, *, variant: str | None = None) -> Checkpoint:
    """Open a diffusers checkpoint without reading its weights.

    Args:
        source: the directory, or a hub id: "org/name" or "org/name@revision".
        variant: "fp16" or "bf16" to read files of that variant. As in diffusers, a component that has none
            gives its default files; at least one must have it.

    Raises:
        CheckpointError: missing or foreign directory, missing component, pickles, damaged or misfit weights.
    """
    path = (
        fetch_snapshot(source, variant=variant)
        if isinstance(source, str) and is_hub_id(source)
        else Path(source)
    )
    if path.suffix in NATIVE_SUFFIXES and path.is_file():
        raise CheckpointError(
            f"{path} is a native checkpoint: one file of weights", hint="run `ditc convert` on it first"
        )
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory", hint="give the folder that holds model_index.json"
        )
    if not (path / "model_index.json").is_file():
        raise CheckpointError(
            f"{path} has no model_index.json",
            hint="give a diffusers directory, or run `ditc convert` on a native checkpoint first",
        )
    model_index = read_json(path / "model_index.json")
    components: dict[str, Component] = {}
    scheduler_config: dict[str, Any] = {}
    tokenizers: dict[str, Path] = {}
    for name, class_name in _parts(path, model_index).items():
        directory = path / name
        if not directory.is_dir():
            raise CheckpointError(
                f"{path} has no folder {name!r}, which model_index.json names as a {class_name}",
                hint="the checkpoint is incomplete: fetch the missing folder",
            )
        if class_name.endswith("Scheduler"):
            scheduler_config = read_json(directory / "scheduler_config.json")
        elif "Tokenizer" in class_name:
            tokenizers[name] = directory
        elif not class_name.endswith(("Processor", "FeatureExtractor")):
            components[name] = open_component(directory, variant=variant)
    if variant is not None and not any(_has_variant(path / name, variant) for name in components):
        raise CheckpointError(
            f"no component of {path} has weights of variant {variant!r}",
            hint="leave --variant out, or fetch the variant",
        )
    return Checkpoint(
        path=path,
        model_index=model_index,
        components=components,
        scheduler_config=scheduler_config,
        tokenizers=tokenizers,
        defaults=read_defaults(path / "ditc.json"),
        variant=variant,
    )


def open_component(directory: Path, *, variant: str | None = None) -> Component:
    """Open one network's folder: config.json and safetensors.

    Raises:
        CheckpointError: missing config, pickles, damaged or misfit weights.
    """
    config = read_json(directory / "config.json")
    tensors, files = read_weights(
        directory, variant if variant and _has_variant(directory, variant) else None
    )
    return Component(directory.name, config, tensors, files)


def check_finite(component: Component) -> None:
    """Read every floating-point weight once, one tensor at a time.

    Raises:
        CheckpointError: a NaN or Inf, with the tensor's name and how many there are.
    """
    for name in component.tensors:
        if not component.tensors.dtype(name).is_floating_point:
            continue
        tensor = component.tensors[name]
        if tensor.dtype.itemsize == 1:
            tensor = tensor.to(torch.float16)  # torch has no isfinite for 8-bit floats
        # Smallest and largest value carry a NaN or an Inf, and need no copy of the tensor, as isfinite does.
        if not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            continue
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise CheckpointError(
                f"{component.name}: {name} has {bad} of {tensor.numel()} values that are NaN or Inf",
                hint="the checkpoint is damaged or its training diverged; fetch it again",
            )


def _has_variant(directory: Path, variant: str) -> bool:
    return any(directory.glob(f"*.{variant}.*"))


def _parts(path: Path, model_index: dict[str, Any]) -> dict[str, str]:
    """Folder name -> class name, for every component that model_index.json names and does not null."""
    parts: dict[str, str] = {}
    for name, value in model_index.items():
        if not isinstance(value, list):
            continue  # _class_name, _diffusers_version and the pipeline's scalar settings
        if Path(name).name != name:
            raise CheckpointError(
                f"{path / 'model_index.json'} names a component {name!r} outside the checkpoint"
            )
        if len(value) == 2 and isinstance(value[1], str):
            parts[name] = value[1]
    if not parts:
        raise CheckpointError(
            f"{path / 'model_index.json'} names no components", hint="is this a diffusers pipeline?"
        )
    return parts
