"""Seeded LoRA files, made with peft and saved by diffusers, and the weights that diffusers makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

SANA_LAYERS = (
    *("patch_embed.proj", "time_embed.linear", "caption_projection.linear_1", "proj_out"),
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.conv_inverted", "ff.conv_point"),
)


def make_lora(
    pipeline: Any,
    folder: Path,
    *,
    layers: Sequence[str] = SANA_LAYERS,
    text_layers: Sequence[str] = (),
    seed: int = 0,
    strength: float = 0.05,
    metadata: bool = True,
    **settings: Any,
) -> Path:
    """Write a LoRA of the pipeline's transformer, and of its first text encoder if layers of it are named.

    The pipeline is changed: make it anew for every file.

    Args:
        strength: the standard deviation of both matrices' values.
        metadata: save peft's settings too.
        settings: of peft's LoraConfig, such as r and lora_alpha.
    """
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    settings = {"r": 4, "lora_alpha": 4, **settings}
    torch.manual_seed(seed)
    adapted = {
        "transformer": (pipeline.transformer, layers),
        "text_encoder": (pipeline.text_encoder, text_layers),
    }
    saved: dict[str, Any] = {}
    used: dict[str, nn.Module] = {}
    for name, (network, targets) in adapted.items():
        if targets:
            config = LoraConfig(target_modules=list(targets), **settings)
            inject_adapter_in_model(config, network)
            network.peft_config = {"default": config}
            _randomize(network, strength)
            saved[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
            used[name] = network
    meta = _collate_lora_metadata(used) if metadata else {}
    pipeline.save_lora_weights(str(folder), **saved, **meta)
    return folder / "pytorch_lora_weights.safetensors"


def _randomize(network: nn.Module, strength: float) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.normal_(0, strength)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))


def fused_text_encoder(network: nn.Module, file: Path, scale: float, **settings: Any) -> nn.Module:
    """A text encoder after peft has merged the file's part for it.

    diffusers leaves text encoders to transformers, which (5.24) refuses every peft that is published (0.21.2).
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file

    prefix = "text_encoder."
    state = {n.removeprefix(prefix): t for n, t in load_file(file).items() if n.startswith(prefix)}
    targets = sorted({name.partition(".lora_")[0] for name in state})
    inject_adapter_in_model(LoraConfig(target_modules=targets, **settings), network)
    set_peft_model_state_dict(network, state)
    for path, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", scale)
            module.merge()
            network.set_submodule(path, module.get_base_layer())
    return network


def fused(pipeline: Any, files: Sequence[tuple[Path, float]]) -> Any:
    """The pipeline after diffusers has fused the files with their scales."""
    names = [f"lora{index}" for index in range(len(files))]
    for name, (file, _) in zip(names, files, strict=True):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(names, [scale for _, scale in files])
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()
    return pipeline
