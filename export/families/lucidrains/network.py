"""A lucidrains/mmdit trunk as a denoiser, with the layers around it that upstream leaves to its user.

The layers are standard ones: a patch embedding as in SD3, fixed 2-D sinusoids as in Sana, a timestep embedding as in
both, a Linear for the text encoder's states, and a Linear back to patches after the trunk's own final norm. The
prediction is a velocity. The two networks hold:

    conditioner   context_embedder
    denoiser      patch_embed.proj, time_embed, trunk, proj_out
"""

# R rows, C latent channels, H/W latent size, h/w patches per side, N = h*w image tokens, S text tokens, D width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ditc.export.families.lucidrains.config import GENERALIZED, MMDiTConfig
from ditc.export.families.lucidrains.generalized import GeneralizedMMDiT
from ditc.export.families.lucidrains.trunk import MMDiT
from ditc.export.networks.layers import ConvAsLinear, TimestepEmbedder, from_patches, to_patches
from ditc.export.networks.loading import Without, build_empty, check_layers, load_strict
from ditc.export.networks.position import SincosPosition

TRUNK = "trunk."


def load_mmdit(
    config: MMDiTConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[MMDiTConditioner, MMDiTDenoiser]:
    """Load both networks with the weights of a transformer/ directory, in dtype.

    The checkpoint may hold `unused_tensors`, which are not read.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    check_layers("the trunk's depth", config.trunk["depth"], tensors, "trunk.blocks")
    conditioner = build_empty(lambda: MMDiTConditioner(config))
    denoiser = build_empty(lambda: MMDiTDenoiser(config))
    used = Without(tensors, *unused_tensors(config, tensors))
    load_strict({"conditioner": conditioner, "denoiser": denoiser}, used, dtype)
    return conditioner, denoiser


def unused_tensors(config: MMDiTConfig, names: Mapping[str, Tensor] | Sequence[str]) -> list[str]:
    """The names of tensors that no picture depends on: those that only serve the text tokens after the last attention.

    Upstream's skip_feedforward_text_tokens leaves the last text feedforward unused. The others are unused because a
    denoiser does not return its text tokens.
    """
    patterns = [TRUNK + pattern for pattern in _unused_patterns(config)]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _unused_patterns(config: MMDiTConfig) -> list[str]:
    last = f"blocks.{config.trunk['depth'] - 1}."
    if config.trunk_class == GENERALIZED:
        residual = ("residual_scale", "static_beta", "dynamic_beta_fn", "h_post_scale")
        return [
            "norms.0.g",
            f"{last}joint_attn.to_out.0.weight",
            *(f"{last}{part}.0.*" for part in ("ff_residual_fns", "ff_layernorms", "feedforwards")),
            *(f"{last}attn_residual_fns.0.{name}" for name in residual),
        ]
    beta = ("static_beta", "dynamic_beta_fn", "dynamic_beta_scale")
    # Without registers, upstream saves an empty (0, dim) tensor.
    registers = () if config.trunk.get("num_register_tokens", 0) else ("register_tokens",)
    return [
        *registers,
        f"{last}joint_attn.to_out.0.weight",
        *(f"{last}{part}.*" for part in ("text_ff_residual_fn", "text_ff_layernorm", "text_ff")),
        *(f"{last}text_attn_residual_fn.{name}" for name in beta),
    ]


class MMDiTConditioner(nn.Module):
    """The layers that depend on the text but not on the step.

    There is only one, because joint attention mixes text and image in every block.
    """

    weights_below = ""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.context_embedder = nn.Linear(config.caption_channels, config.dims[0])

    def forward(self, text_embeds: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """text_embeds (R,S,caption_channels), text_mask (R,S) -> text_tokens (R,S,D), key_mask (R,S) fp32."""
        return self.context_embedder(text_embeds.to(self.context_embedder.weight.dtype)), text_mask.float()


class MMDiTDenoiser(nn.Module):
    """Predicts the velocity of the latents from the timestep and a conditioner's outputs."""

    weights_below = ""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width, patch = config.dims[1], config.patch_size
        self.patch_size = patch
        self.position = SincosPosition(width, config.sample_size // patch, config.interpolation_scale)
        self.patch_embed = nn.ModuleDict({"proj": ConvAsLinear(config.in_channels, width, patch)})
        self.time_embed = TimestepEmbedder(config.trunk["dim_cond"])
        self.trunk = make_trunk(config)
        self.proj_out = nn.Linear(width, patch * patch * config.out_channels)

    def forward(self, latents: Tensor, t: Tensor, text_tokens: Tensor, key_mask: Tensor) -> Tensor:
        """Predict from one step's inputs.

        Args:
            latents: (R,C,H,W) in the network's dtype.
            t: (R,) fp32, already multiplied by the config's timestep_scale.
            text_tokens, key_mask: as MMDiTConditioner returns them.

        Returns:
            (R,out_channels,H,W) in the network's dtype.
        """
        height, width = latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size
        image_RND = self.patch_embed["proj"](to_patches(latents, self.patch_size))
        image_RND = (image_RND + self.position(height, width, image_RND.device)).to(image_RND.dtype)
        time_RD = self.time_embed(t, dtype=image_RND.dtype)
        if isinstance(self.trunk, MMDiT):
            _, image_RND = self.trunk(text_tokens, image_RND, key_mask, time_RD)
        else:
            (image_RND,) = self.trunk((text_tokens, image_RND), (key_mask, None), time_RD)
        return from_patches(self.proj_out(image_RND), self.patch_size, height, width)


def make_trunk(config: MMDiTConfig) -> MMDiT | GeneralizedMMDiT:
    """Make the trunk of a denoiser, without the layers that only serve the text tokens after the last attention."""
    if config.trunk_class == GENERALIZED:
        return GeneralizedMMDiT(**config.trunk, read=(False, True))
    return MMDiT(**config.trunk, return_text=False)
