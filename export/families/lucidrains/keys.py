"""The layout of a lucidrains/mmdit checkpoint, which ditc defines, and how to save one (docs/mmdit.md).

Upstream publishes a trunk but no checkpoints, so there are no native files that `ditc convert` could read. `save_mmdit`
writes the trunk's tensors with the prefix TRUNK, the tensors of the layers around the trunk, and a model_index.json
that names the other components' classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditc.export.checkpoint.json_files import read_json
from ditc.export.checkpoint.tensors import TensorEntry, TensorSource
from ditc.export.convert.writer import write_weights
from ditc.export.families.lucidrains.config import CLASS_NAME, MMDiTConfig
from ditc.export.families.lucidrains.network import TRUNK, load_mmdit
from ditc.export.families.lucidrains.pipeline import PIPELINE_CLASS
from ditc.runtime.atomic import atomic_folder, write_atomic
from ditc.runtime.errors import CheckpointError

# The components that the caller saves beforehand, each with its own save_pretrained. For each: its library, and the
# file and key that name its class.
OTHERS = {
    "text_encoder": ("transformers", "config.json", "architectures"),
    "tokenizer": ("transformers", "tokenizer_config.json", "tokenizer_class"),
    "vae": ("diffusers", "config.json", "_class_name"),
    "scheduler": ("diffusers", "scheduler_config.json", "_class_name"),
}


def save_mmdit(
    directory: Path,
    *,
    config: Mapping[str, Any],
    trunk: Mapping[str, Tensor],
    shell: Mapping[str, Tensor],
) -> Path:
    """Write transformer/ and model_index.json into a directory that already holds the other components.

    Args:
        directory: holds text_encoder/, tokenizer/, vae/ and scheduler/.
        config: the fields of MMDiTConfig: trunk_class, `trunk` with that class's arguments, in_channels and the rest.
        trunk: state_dict() of upstream's MMDiT.
        shell: tensors of the layers around the trunk: patch_embed.proj.{weight,bias} of a Conv2d,
            time_embed.linear_{1,2}.{weight,bias}, context_embedder.{weight,bias} and proj_out.{weight,bias}.

    Returns:
        The directory, ready for `ditc build`.

    Raises:
        CheckpointError: a component is missing, transformer/ exists already, or a setting or a tensor does not fit.
            Nothing has been written then.
    """
    components = _others(directory)
    transformer = directory / "transformer"
    if transformer.exists():
        raise CheckpointError(
            f"{transformer} exists already", hint="remove it first, or choose another directory"
        )
    tensors = {f"{TRUNK}{name}": tensor for name, tensor in trunk.items()} | dict(shell)
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    load_mmdit(MMDiTConfig.from_json(config), tensors, torch.float32)  # raises if the tensors do not fit
    with atomic_folder(transformer) as folder:
        write_weights(_source(tensors), folder)
        _write_json(folder / "config.json", {"_class_name": CLASS_NAME, **config})
    _write_json(
        directory / "model_index.json",
        {"_class_name": PIPELINE_CLASS, "transformer": ["ditc", CLASS_NAME], **components},
    )
    return directory


def _others(directory: Path) -> dict[str, list[str]]:
    missing = [name for name in OTHERS if not (directory / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{directory} has no folder {', '.join(missing)}",
            hint="save these components first, such as text_encoder.save_pretrained(directory / 'text_encoder')",
        )
    return {
        name: [library, _first(read_json(directory / name / file).get(key, ""))]
        for name, (library, file, key) in OTHERS.items()
    }


def _first(value: Any) -> str:
    """The name of a class, or the first name of a list."""
    return str(value[0] if isinstance(value, list) and value else value)


def _source(tensors: Mapping[str, Tensor]) -> TensorSource:
    return TensorSource(
        {
            name: TensorEntry(tuple(tensor.shape), tensor.dtype, partial(_identity, tensor))
            for name, tensor in tensors.items()
        }
    )


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")
