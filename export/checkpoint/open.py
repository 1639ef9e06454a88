"""Open a checkpoint: configs as data, weights as tensors that stay on disk until they are used.

A diffusers directory holds a model_index.json, which names the components, and one folder for each component:

    model_index.json    {"_class_name": "SanaPipeline", "transformer": ["diffusers", "Sana..."]}
    transformer/        config.json + diffusion_pytorch_model[.variant].safetensors, single or sharded
    scheduler/          scheduler_config.json
    tokenizer/          tokenizer.json
    ditc.json           optional: the checkpoint's own inference defaults
    recipe.int8.json    optional: the recipe of 8-bit builds (export/quant/recipes.py), likewise recipe.fp8.json
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ditc.export.checkpoint.defaults import read_defaults
from ditc.export.checkpoint.file_content import check_content, check_contents
from ditc.export.checkpoint.foreign_weights import check_adapter, check_config, warn_of_loras
from ditc.export.checkpoint.hub import fetch_snapshot, is_hub_id
from ditc.export.checkpoint.json_files import read_json
from ditc.export.checkpoint.model_index import (
    ComponentClass,
    component_classes,
    config_as_opened,
    without_defaults,
)
from ditc.export.checkpoint.naming import naming
from ditc.export.checkpoint.tensors import TensorSource
from ditc.export.checkpoint.weights import has_variant, read_weights
from ditc.runtime.bundle.manifest import FoldedLora
from ditc.runtime.errors import CheckpointError

log = logging.getLogger(__name__)

TRANSFORMERS = "transformers"  # its configs name no class that it would be opened with
NATIVE_SUFFIXES = frozenset({".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".gguf"})

# The hints of errors about a whole component.
INCOMPLETE = (
    "fetch model_index.json and the component again, or save the whole pipeline. If `ditc convert` made the "
    "checkpoint, convert again with --base, which names a diffusers checkpoint that has the component"
)
OTHER_NETWORK = "ditc does not compute such a network: the setting is part of the model, so do not change it"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Component:
    """One network of a checkpoint: its config, its weights, the files that hold the weights, and its class."""

    name: str
    config: dict[str, Any]
    tensors: TensorSource
    files: tuple[Path, ...]
    class_name: str = ""

    @property
    def place(self) -> Path:
        """The file of the weights; the folder, if there are several files."""
        return self.files[0] if len(self.files) == 1 else self.folder

    def read_config(self, parse: Callable[[Mapping[str, Any]], T]) -> T:
        """What parse makes of the config. Its errors name the file."""
        with naming(self.folder / "config.json", hint=OTHER_NETWORK):
            return parse(self.config)

    @property
    def folder(self) -> Path:
        """The folder of the weights and of config.json."""
        return self.files[0].parent if self.files else Path(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened diffusers directory.

    Attributes:
        components: the networks, by the names of their folders.
        tokenizers: a tokenizer's name -> its folder.
        defaults: the contents of ditc.json.
        variant: the variant whose weight files are read where a component has them; None for the default files.
        loras: the LoRAs that are in the components' tensors (export/checkpoint/loras.py). Their files have none of it.
        controlnet: the folder of a ControlNet that is not the directory's own (export/checkpoint/controlnet.py).
    """

    path: Path
    model_index: dict[str, Any]
    components: dict[str, Component]
    scheduler_config: dict[str, Any]
    tokenizers: dict[str, Path]
    defaults: dict[str, Any]
    variant: str | None = None
    loras: tuple[FoldedLora, ...] = ()
    controlnet: Path | None = None

    def component(self, name: str) -> Component:
        """The network of that name. Raises CheckpointError, which lists the networks, if there is none."""
        if name not in self.components:
            raise CheckpointError(
                f"{self.path} has no component {name!r}, only {', '.join(sorted(self.components))}",
                hint=INCOMPLETE,
            )
        return self.components[name]


def open_checkpoint(source: str | Path, *, variant: str | None = None) -> Checkpoint:
    """Open a diffusers checkpoint without reading its weights.

    Args:
        source: the directory, or a hub id: "org/name" or "org/name@revision".
        variant: which weight files to read, such as "fp16" or "bf16". A component without files of the variant gives
            its default files, as in diffusers, but at least one component must have the variant.

    Raises:
        CheckpointError: the directory is missing or not a diffusers checkpoint, a component is missing, weights are
            pickled, damaged or do not fit their index, or no component has the variant.
    """
    path = (
        fetch_snapshot(source, variant=variant)
        if isinstance(source, str) and is_hub_id(source)
        else Path(source)
    )
    if path.suffix in NATIVE_SUFFIXES and path.is_file():
        check_content(path, torch_is_right=True)
        raise CheckpointError(
            f"{path} is a native checkpoint, which is one file of weights",
            hint="run `ditc convert` on it first",
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
    for name, opened_as in component_classes(path, model_index).items():
        directory, class_name = path / name, opened_as.name
        if not directory.is_dir():
            raise CheckpointError(
                f"{path} has no folder {name!r}, which model_index.json names as a {class_name}",
                hint="the checkpoint is incomplete: fetch the missing folder",
            )
        if class_name.endswith("Scheduler"):
            scheduler_config = _scheduler_config(directory / "scheduler_config.json", class_name)
        elif "Tokenizer" in class_name:
            check_contents(directory)
            tokenizers[name] = directory
        elif not class_name.endswith(("Processor", "FeatureExtractor")):
            components[name] = open_component(directory, variant=variant, opened_as=opened_as)
    if variant is not None and not any(has_variant(path / name, variant) for name in components):
        raise CheckpointError(
            f"no component of {path} has weights of variant {variant!r}",
            hint="leave --variant out, or fetch the variant",
        )
    warn_of_loras(path, {file for component in components.values() for file in component.files})
    return Checkpoint(
        path=path,
        model_index=model_index,
        components=components,
        scheduler_config=scheduler_config,
        tokenizers=tokenizers,
        defaults=read_defaults(path / "ditc.json"),
        variant=variant,
    )


def open_component(
    directory: Path, *, variant: str | None = None, opened_as: ComponentClass | None = None
) -> Component:
    """Open one network's folder, which holds config.json and safetensors.

    Args:
        opened_as: the class that model_index.json names; None where there is no such file.

    Raises:
        CheckpointError: the config or the weights are missing, the config belongs to another class, or the weights
            are pickled, damaged, quantized, or do not fit their index.
    """
    config = read_json(directory / "config.json")
    check_config(directory / "config.json", config)
    check_adapter(directory)
    class_name = str(config.get("_class_name", ""))
    if opened_as is not None:
        class_name = opened_as.name
        if opened_as.library != TRANSFORMERS:
            config = config_as_opened(directory, config, opened_as)
    tensors, files = read_weights(directory, variant if variant and has_variant(directory, variant) else None)
    return Component(directory.name, config, tensors, files, class_name)


def check_finite(component: Component) -> None:
    """Read every floating-point weight once, one tensor at a time, and refuse NaN and Inf.

    Raises:
        CheckpointError: a tensor holds NaN or Inf; the error gives the tensor's name and their count.
    """
    with naming(component.place):
        _check_finite(component.tensors)


def _check_finite(tensors: TensorSource) -> None:
    for name in tensors:
        if not tensors.dtype(name).is_floating_point:
            continue
        tensor = tensors[name]
        if tensor.dtype.itemsize == 1:
            tensor = tensor.to(torch.float16)  # torch has no isfinite for 8-bit floats
        # A NaN or Inf shows in the smallest or the largest value. Finding these needs no copy of the tensor, while
        # isfinite makes one.
        if not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            continue
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise CheckpointError(
                f"{name} has {bad} of {tensor.numel()} values that are NaN or Inf",
                hint="the checkpoint is damaged or its training diverged; fetch it again",
            )


def _scheduler_config(path: Path, class_name: str) -> dict[str, Any]:
    """The scheduler's settings as diffusers reads them: with the class of model_index.json, whoever saved the file.

    That is how diffusers lets one scheduler continue with the settings of another. The caller refuses settings that
    the class reads and ditc does not compute.
    """
    config = read_json(path)
    saved_as = config.get("_class_name", class_name)
    if saved_as != class_name:
        log.warning(
            "%s was saved by %s, but model_index.json names %s, which is what the bundle will use, as in diffusers",
            path,
            saved_as,
            class_name,
        )
    return without_defaults(config) | {"_class_name": class_name}
