"""The layout of a lucidrains/mmdit checkpoint, which ditc defines, and how to save one (docs/mmdit.md).

Upstream publishes a trunk and no checkpoints, so there are no native files, and nothing for `ditc convert` to read.
`save_mmdit` writes the trunk under TRUNK beside the layers around it, and names the other components' classes.
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
from ditc.runtime.atomic import atomic_folder, write_atomic
from ditc.runtime.errors import CheckpointError

PIPELINE = "LucidrainsMMDiTPipeline"
# What the caller saves first, each with its own save_pretrained: library, and the file and key that name the class.
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
        directory: with text_encoder/, tokenizer/, vae/ and scheduler/.
        config: MMDiTConfig's fields: trunk_class, the trunk's own arguments as `trunk`, in_channels and the rest.
        trunk: state_dict() of upstream's MMDiT.
        shell: patch_embed.proj.{weight,bias}, a Conv2d's; time_embed.linear_{1,2}.{weight,bias};
            context_embedder.{weight,bias}; proj_out.{weight,bias}.

    Returns:
        The directory, ready for `ditc build`.

    Raises:
        CheckpointError: before anything is written: a component is missing, transformer/ is there already, a setting
            or a tensor does not fit.
    """
    components = _others(directory)
    transformer = directory / "transformer"
    if transformer.exists():
        raise CheckpointError(f"{transformer} exists", hint="remove it first, or choose another directory")
    tensors = {f"{TRUNK}{name}": tensor for name, tensor in trunk.items()} | dict(shell)
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    load_mmdit(MMDiTConfig.from_json(config), tensors, torch.float32)  # refuses what does not fit
    with atomic_folder(transformer) as folder:
        write_weights(_source(tensors), folder)
        _write_json(folder / "config.json", {"_class_name": CLASS_NAME, **config})
    _write_json(
        directory / "model_index.json",
        {"_class_name": PIPELINE, "transformer": ["ditc", CLASS_NAME], **components},
    )
    return directory


def _others(directory: Path) -> dict[str, list[str]]:
    missing = [name for name in OTHERS if not (directory / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{directory} has no folder {', '.join(missing)}",
            hint="save them there first: text_encoder.save_pretrained(directory / 'text_encoder'), and so on",
        )
    return {
        name: [library, _first(read_json(directory / name / file).get(key, ""))]
        for name, (library, file, key) in OTHERS.items()
    }


def _first(value: Any) -> str:
    """A class, or the first of a list of classes."""
    return str(value[0] if isinstance(value, list) and value else value)


def _source(tensors: Mapping[str, Tensor]) -> TensorSource:
    return TensorSource(
        {
            name: TensorEntry(tuple(tensor.shape), tensor.dtype, partial(_itself, tensor))
            for name, tensor in tensors.items()
        }
    )


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")
