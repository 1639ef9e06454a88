"""Seeded lucidrains/mmdit checkpoints of a few hundred kilobytes around the package's own trunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_sana import make_pipeline
from tiny_sd3 import JOINT, make_t5, make_t5_tokenizer, make_vae
from torch import nn

from ditc.export.families.lucidrains.keys import save_mmdit

DIM_TEXT, DIM_IMAGE, DIM_COND = 24, 32, 16
TWO: dict[str, Any] = {
    "depth": 2,
    "dim_text": DIM_TEXT,
    "dim_image": DIM_IMAGE,
    "dim_cond": DIM_COND,
    "dim_head": 16,
    "heads": 2,
    "num_register_tokens": 3,
    "num_residual_streams": 1,
}
GENERALIZED: dict[str, Any] = {
    "depth": 2,
    "dim_modalities": [DIM_TEXT, DIM_IMAGE],
    "dim_cond": DIM_COND,
    "dim_head": 16,
    "heads": 2,
    "num_residual_streams": 4,
    "softclamp": True,
    "softclamp_value": 20.0,
}


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights as large as a trained network's, and move every vector away from its default.

    Upstream's gammas start at 1; its betas, dynamic connections and modulation start at 0.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = max(1, parameter.numel() // max(1, parameter.shape[0])) if parameter.dim() > 1 else 1
            parameter.copy_(noise * fan_in**-0.5 if parameter.dim() > 1 else 0.5 + 0.3 * noise)
    return module.eval()


@dataclass(frozen=True)
class Companions:
    """The text encoder, tokenizer and VAE around a trunk, and their numbers of channels, which the shell needs."""

    components: dict[str, Any]
    channels: int
    caption_channels: int


def gemma_and_dc_ae(seed: int) -> Companions:
    """The companions of the tiny Sana checkpoint."""
    pipeline = make_pipeline(seed)
    names = ("text_encoder", "tokenizer", "vae")
    return Companions({name: getattr(pipeline, name) for name in names}, channels=8, caption_channels=24)


def t5_and_kl(seed: int) -> Companions:
    """T5 and the VAE of the tiny SD3 checkpoint."""
    torch.manual_seed(seed)
    components = {"text_encoder": make_t5(), "tokenizer": make_t5_tokenizer(), "vae": make_vae()}
    return Companions(components, channels=16, caption_channels=JOINT)


def make_checkpoint(
    directory: Path,
    seed: int = 0,
    *,
    trunk: dict[str, Any] | None = None,
    companions: Callable[[int], Companions] = gemma_and_dc_ae,
) -> Path:
    """Save the components as a user would: a trunk of the package, with plain torch modules around it."""
    import mmdit.mmdit_generalized_pytorch
    import mmdit.mmdit_pytorch

    trunk = TWO if trunk is None else trunk
    generalized = "dim_modalities" in trunk
    package = mmdit.mmdit_generalized_pytorch if generalized else mmdit.mmdit_pytorch
    network = seeded(package.MMDiT(**trunk), seed)
    around = companions(seed)
    shell = seeded(
        nn.ModuleDict(
            {
                "patch_embed": nn.ModuleDict({"proj": nn.Conv2d(around.channels, DIM_IMAGE, 2, stride=2)}),
                "time_embed": nn.ModuleDict(
                    {"linear_1": nn.Linear(256, DIM_COND), "linear_2": nn.Linear(DIM_COND, DIM_COND)}
                ),
                "context_embedder": nn.Linear(around.caption_channels, DIM_TEXT),
                "proj_out": nn.Linear(DIM_IMAGE, 2 * 2 * around.channels),
            }
        ),
        seed + 1,
    )
    for name, component in around.components.items():
        component.save_pretrained(directory / name)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(directory / "scheduler")
    (directory / "ditc.json").write_text(
        '{"height": 64, "width": 64, "max_sequence_length": 12, "num_inference_steps": 4, "guidance_scale": 3.0}\n'
    )
    return save_mmdit(
        directory,
        config={
            "trunk_class": "GeneralizedMMDiT" if generalized else "MMDiT",
            "trunk": trunk,
            "in_channels": around.channels,
            "out_channels": around.channels,
            "patch_size": 2,
            "sample_size": 16,
            "caption_channels": around.caption_channels,
        },
        trunk=network.state_dict(),
        shell=shell.state_dict(),
    )
