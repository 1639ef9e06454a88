"""Convert a native checkpoint, Sana's or SD3's, to a diffusers directory, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.checkpoint.safetensors_file import safetensors_path
from ditc.export.checkpoint.tensors import TensorSource
from ditc.export.convert.native_file import read_native
from ditc.export.convert.new_directory import check_free, copy_others, write_json
from ditc.export.convert.writer import MAX_SHARD_BYTES, write_weights
from ditc.export.families.sana.keys import SanaKeys, to_diffusers, to_native
from ditc.export.families.sana.native import (
    DTYPES,
    NativeOptions,
    detect_keys,
    transformer_config,
)
from ditc.export.families.sd3 import convert as convert_sd3
from ditc.export.families.sd3.native import is_stability
from ditc.runtime.atomic import atomic_folder
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.files import check_writable


def convert(
    source: Path,
    out: Path,
    *,
    options: NativeOptions,
    base: str | Path | None = None,
    variant: str | None = None,
    ema: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a native checkpoint as a diffusers directory; its names tell whose it is.

    Args:
        source: a .pth or .safetensors file with native names.
        out: the directory to make; it appears whole or not at all.
        options: what the checkpoint's keys cannot tell.
        base: a diffusers checkpoint whose other parts (text encoder, tokenizer, VAE) are copied; without it
            only what the file holds and the scheduler are written.
        variant: of base's weight files.
        ema: take the averaged weights of a training file.

    Raises:
        UsageError: a missing option, or an output that is there already.
        CheckpointError: a foreign, damaged or misshapen checkpoint, or a value that dtype cannot hold.
    """
    check_free(out)
    native = read_native(source, ema=ema)
    others = open_checkpoint(base, variant=variant) if base is not None else None
    if is_stability(native):
        with atomic_folder(out) as directory:
            convert_sd3.write_directory(
                native, directory, options=options, base=others, max_shard_bytes=max_shard_bytes
            )
        return out
    keys = detect_keys(native)
    config = transformer_config(native, keys, options)
    tensors = to_diffusers(native, keys)
    _check_shapes(config, tensors, keys)
    assert options.dtype is not None  # transformer_config asked for it
    with atomic_folder(out) as directory:
        write_weights(
            tensors, directory / "transformer", dtype=DTYPES[options.dtype], max_shard_bytes=max_shard_bytes
        )
        write_json(directory / "transformer" / "config.json", config)
        scheduler = _write_scheduler(directory / "scheduler", keys, options)
        index = {
            "_class_name": "SanaSprintPipeline" if keys.guidance_embeds else "SanaPipeline",
            **copy_others(others, directory, ("transformer",)),
            "scheduler": ["diffusers", scheduler],
            "transformer": ["diffusers", "SanaTransformer2DModel"],
        }
        write_json(directory / "model_index.json", index)
    return out


def convert_to_native(source: str | Path, out: Path, *, variant: str | None = None) -> Path:
    """Write the transformer of a diffusers checkpoint as one .safetensors file with native names; of SD3 also the VAE.

    Training-only tensors do not come back: load it into the native network with strict=False.

    Raises:
        UsageError: an output that is there already or has another suffix.
        CheckpointError: a checkpoint that is neither Sana's nor SD3's.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"{out} is not a .safetensors", hint="name it native.safetensors")
    check_free(out)
    check_writable(out, "OUT")
    checkpoint = open_checkpoint(source, variant=variant)
    transformer = checkpoint.component("transformer")
    if transformer.config.get("_class_name") == convert_sd3.CLASSES["transformer"][1]:
        native = convert_sd3.to_stability(checkpoint)
    else:
        keys = SanaKeys(
            num_layers=sum(name.endswith(".attn1.to_q.weight") for name in transformer.tensors),
            qk_norm=any(name.endswith(".norm_q.weight") for name in transformer.tensors),
            guidance_embeds=any(".guidance_embedder." in name for name in transformer.tensors),
        )
        native = to_native(transformer.tensors, keys)
    with safetensors_path(out, hint="choose another OUT") as partial:
        save_file({name: tensor.contiguous() for name, tensor in native.items()}, partial)
    return out


def _check_shapes(config: dict[str, Any], tensors: TensorSource, keys: SanaKeys) -> None:
    """Hold every tensor's shape against diffusers' own network, built without memory for its weights."""
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        network = SanaTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    native_names = {part: name for name, parts in keys.rows().items() for part in parts}
    for name, parameter in network.state_dict().items():
        if tensors.shape(name) != tuple(parameter.shape):
            raise CheckpointError(
                f"{native_names[name]} gives {name} the shape {list(tensors.shape(name))}, "
                f"the network needs {list(parameter.shape)}",
                hint="the file is damaged, or --attention-head-dim is not the network's",
            )


def _write_scheduler(directory: Path, keys: SanaKeys, options: NativeOptions) -> str:
    """diffusers' scheduler of the family, as both converters choose it. Returns its class name."""
    from diffusers import DPMSolverMultistepScheduler, SCMScheduler

    if keys.guidance_embeds:
        scheduler = SCMScheduler(num_train_timesteps=1000, prediction_type="trigflow", sigma_data=0.5)
    else:
        scheduler = DPMSolverMultistepScheduler(
            flow_shift=options.flow_shift, use_flow_sigmas=True, prediction_type="flow_prediction"
        )
    scheduler.save_pretrained(directory)
    return type(scheduler).__name__
