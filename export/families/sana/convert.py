"""Convert a native Sana file of NVlabs to a diffusers directory, and back."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ditc.export.checkpoint.naming import naming
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.tensors import TensorSource
from ditc.export.convert.layout import DTYPES, NativeLayout, NativeOptions
from ditc.export.convert.new_directory import copy_others, write_json
from ditc.export.convert.writer import write_weights
from ditc.export.families.sana.keys import SanaKeys, keys_of, to_diffusers, to_native
from ditc.export.families.sana.native import detect_keys, is_native, transformer_config
from ditc.export.families.sana.video_native import video_transformer_config
from ditc.runtime.errors import CheckpointError


class SanaLayout:
    """The layout of NVlabs/Sana's files, which hold only the transformer (of Sana, SANA-1.5, -Sprint or -Video)."""

    needed: Collection[str] = ("text_encoder", "tokenizer", "vae")

    def recognises(self, names: Collection[str]) -> bool:
        """Whether the names are those of a Sana network."""
        return is_native(names)

    def write_directory(
        self,
        native: TensorSource,
        directory: Path,
        *,
        options: NativeOptions,
        base: Checkpoint | None,
        max_shard_bytes: int,
    ) -> None:
        """Write the transformer and its scheduler, and copy the other components from base."""
        keys = detect_keys(native)
        config_of = video_transformer_config if keys.video else transformer_config
        config = config_of(native, keys, options)
        tensors = to_diffusers(native, keys)
        _check_shapes(config, tensors, keys)
        assert options.dtype is not None  # transformer_config asked for it
        write_weights(
            tensors, directory / "transformer", dtype=DTYPES[options.dtype], max_shard_bytes=max_shard_bytes
        )
        write_json(directory / "transformer" / "config.json", config)
        scheduler = _write_scheduler(directory / "scheduler", keys, options)
        index = {
            "_class_name": _pipeline(keys),
            **copy_others(base, directory, ("transformer",)),
            "scheduler": ["diffusers", scheduler],
            "transformer": ["diffusers", config["_class_name"]],
        }
        write_json(directory / "model_index.json", index)

    def to_native(self, checkpoint: Checkpoint) -> TensorSource:
        """The transformer's tensors under NVlabs' names. Training-only tensors cannot be restored."""
        transformer = checkpoint.component("transformer")
        tensors = transformer.tensors
        with naming(transformer.place):
            return to_native(tensors, keys_of(tensors))


LAYOUT: NativeLayout = SanaLayout()


def _check_shapes(config: dict[str, Any], tensors: TensorSource, keys: SanaKeys) -> None:
    """Compare every tensor's shape with diffusers' own network, which is built without allocating its weights."""
    import diffusers

    network_class = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        network = network_class(**{k: v for k, v in config.items() if not k.startswith("_")})
    native_names = {part: name for name, parts in keys.rows().items() for part in parts}
    for name, parameter in network.state_dict().items():
        if tensors.shape(name) != tuple(parameter.shape):
            raise CheckpointError(
                f"{native_names[name]} gives {name} the shape {list(tensors.shape(name))}, "
                f"but the network needs {list(parameter.shape)}",
                hint="the file is damaged, or --attention-head-dim is of another network",
            )


def _pipeline(keys: SanaKeys) -> str:
    if keys.video:
        return "SanaVideoPipeline"
    return "SanaSprintPipeline" if keys.guidance_embeds else "SanaPipeline"


def _write_scheduler(directory: Path, keys: SanaKeys, options: NativeOptions) -> str:
    """Write the diffusers scheduler that upstream's two converters choose for the network. Returns its class name."""
    from diffusers import DPMSolverMultistepScheduler, SCMScheduler

    if keys.guidance_embeds:
        scheduler = SCMScheduler(num_train_timesteps=1000, prediction_type="trigflow", sigma_data=0.5)
    else:
        scheduler = DPMSolverMultistepScheduler(
            flow_shift=options.flow_shift, use_flow_sigmas=True, prediction_type="flow_prediction"
        )
    scheduler.save_pretrained(directory)
    return type(scheduler).__name__
