"""Sana's transformer as two export-grade networks: one depends on the text alone, the other runs in every step.

The checkpoint's tensors are divided between them: SanaConditioner holds the caption projection and every block's
cross-attention to_k, to_v and norm_k, and SanaDenoiser holds the rest. The reference is diffusers 0.42.1's
SanaTransformer2DModel; the papers are SANA (arXiv 2410.10629), SANA-1.5 (2501.18427: qk-norm) and SANA-Sprint
(2503.09641: embedded guidance).

These stay fp32 in 16-bit networks: norm statistics, linear attention, softmax, sinusoids, text_bias.
"""

# R rows, C latent channels, H/W latent size, h/w tokens per side, N = h*w tokens, S text tokens, L layers, D width

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.families.sana.blocks import QK_NORM_EPS, DenoiserBlock
from ditc.export.families.sana.config import SanaConfig as SanaConfig
from ditc.export.families.sana.text import MASK_BIAS
from ditc.export.families.sana.video_config import SanaVideoConfig
from ditc.export.networks.layers import (
    ConvAsLinear,
    LayerNorm,
    RMSNorm,
    TimestepEmbedder,
    from_patches,
    to_patches,
)
from ditc.export.networks.loading import build_empty, check_layers, load_strict
from ditc.export.networks.position import SincosPosition

CAPTION_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6  # diffusers does not read norm_eps here


def load_sana(
    config: SanaConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    pag_layers: Collection[int] = (),
    residuals: int = 0,
) -> tuple[SanaConditioner, SanaDenoiser]:
    """Load both networks with the weights of a diffusers transformer/ directory, in dtype.

    Args:
        pag_layers: blocks whose self-attention a row's skip_gate turns into the identity. If there are any, the
            denoiser has the input skip_gate.
        residuals: how many residuals of a ControlNet the denoiser takes.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    check_layers("num_layers", config.num_layers, tensors, "transformer_blocks")
    conditioner = build_empty(lambda: SanaConditioner(config))
    denoiser = build_empty(lambda: SanaDenoiser(config, pag_layers, residuals))
    load_strict({"conditioner": conditioner, "denoiser": denoiser}, tensors, dtype)
    return conditioner, denoiser


class SanaConditioner(nn.Module):
    """Everything that depends on the text and not on the step: K and V of every cross-attention."""

    weights_below = ""

    def __init__(self, config: SanaConfig | SanaVideoConfig) -> None:
        super().__init__()
        self.caption_projection = CaptionProjection(config.caption_channels, config.width)
        self.caption_norm = RMSNorm(config.width, CAPTION_NORM_EPS)
        self.transformer_blocks = nn.ModuleList(ConditionerBlock(config) for _ in range(config.num_layers))

    def forward(self, text_embeds: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compute K and V of all layers, and the bias that masks padding.

        Args:
            text_embeds: (R,S,caption_channels), any float dtype. text_mask: (R,S), 1 for a token, 0 for padding.

        Returns:
            cross_kv (R,L,2,S,D) in the network's dtype; text_bias (R,S) fp32, 0 or -10000.
        """
        return self.keys_values(text_embeds), (1.0 - text_mask.float()) * MASK_BIAS

    def keys_values(self, text_embeds: Tensor) -> Tensor:
        """(R,S,caption_channels) -> (R,L,2,S,D)."""
        text = self.caption_norm(self.caption_projection(text_embeds.to(self.caption_norm.weight.dtype)))
        return torch.stack([block.attn2(text) for block in self.transformer_blocks], dim=1)


class SanaDenoiser(nn.Module):
    """Predicts the velocity of the latents from the timestep and a conditioner's outputs.

    Args:
        pag_layers: blocks with perturbed-attention guidance.
        residuals: how many residuals of a ControlNet it takes, which are added after its second block and those that
            follow.
    """

    weights_below = ""

    def __init__(self, config: SanaConfig, pag_layers: Collection[int] = (), residuals: int = 0) -> None:
        super().__init__()
        self.residuals = residuals
        width, patch = config.width, config.patch_size
        self.patch_size = patch
        self.position = None
        if config.interpolation_scale is not None:
            self.position = SincosPosition(width, config.sample_size // patch, config.interpolation_scale)
        self.patch_embed = nn.ModuleDict({"proj": ConvAsLinear(config.in_channels, width, patch)})
        self.time_embed: nn.Module = TimeEmbed(width)
        if config.guidance_embeds:
            self.time_embed = GuidedTimeEmbed(width, config.guidance_embeds_scale)
        self.gated = bool(pag_layers)
        self.transformer_blocks = nn.ModuleList(
            DenoiserBlock(config, perturbed=index in pag_layers) for index in range(config.num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.norm_out = LayerNorm(width, FINAL_NORM_EPS)
        self.proj_out = nn.Linear(width, patch * patch * config.out_channels)

    def forward(self, latents: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        """Predict from one step's inputs.

        Args:
            latents: (R,C,H,W) in the network's dtype.
            t: (R,) fp32, already multiplied by the config's timestep_scale.
            rest: the guidance scale (R,) fp32, only if the network embeds it, then cross_kv and text_bias as
                SanaConditioner returns them, then with pag_layers the gate (R,) fp32, which is 1 for perturbed rows,
                then the residuals (R,H,W,D/p^2) as export/graph/control.py returns them.

        Returns:
            (R,out_channels,H,W) in the network's dtype.
        """
        first = len(rest) - self.residuals
        rest, residuals = rest[:first], rest[first:]
        inputs, skip_gate_R = (rest[:-1], rest[-1]) if self.gated else (rest, None)
        *embedded, cross_kv, text_bias = inputs
        height, width = latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size
        x_RND = self.patch_embed["proj"](to_patches(latents, self.patch_size))
        if self.position is not None:
            x_RND = (x_RND + self.position(height, width, x_RND.device)).to(x_RND.dtype)
        modulation_R6D, embedded_RD = self.time_embed(t, *embedded, dtype=x_RND.dtype)
        mask_R11S = text_bias[:, None, None, :]
        # One Split in the graph. Indices would be two Gathers per block, the first of which copies K and V together.
        keys_values = cross_kv.flatten(1, 2).unbind(1)
        for index, (block, key_RSD, value_RSD) in enumerate(
            zip(self.transformer_blocks, keys_values[::2], keys_values[1::2], strict=True)
        ):
            gate = (skip_gate_R,) if block.perturbed else ()
            x_RND = block(x_RND, modulation_R6D, key_RSD, value_RSD, mask_R11S, height, width, *gate)
            if 0 < index <= self.residuals:
                x_RND = x_RND + residuals[index - 1].reshape(x_RND.shape)
        shift, scale = (self.scale_shift_table + embedded_RD[:, None]).chunk(2, dim=1)
        x_RND = self.proj_out(self.norm_out(x_RND) * (1 + scale) + shift)
        return from_patches(x_RND, self.patch_size, height, width)


class CaptionProjection(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        hidden: Tensor = self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))
        return hidden


class ConditionerBlock(nn.Module):
    """The part of one transformer block that belongs to the conditioner."""

    def __init__(self, config: SanaConfig | SanaVideoConfig) -> None:
        super().__init__()
        self.attn2 = CrossKeyValue(config)


class CrossKeyValue(nn.Module):
    """(R,S,D) text -> (R,2,S,D): K, with qk-norm if the model has it, and V."""

    def __init__(self, config: SanaConfig | SanaVideoConfig) -> None:
        super().__init__()
        self.to_k = nn.Linear(config.width, config.cross_width)
        self.to_v = nn.Linear(config.width, config.cross_width)
        self.norm_k = RMSNorm(config.cross_width, QK_NORM_EPS) if config.qk_norm else nn.Identity()

    def forward(self, text: Tensor) -> Tensor:
        return torch.stack([self.norm_k(self.to_k(text)), self.to_v(text)], dim=1)


class TimeEmbed(nn.Module):
    """adaLN-single: one modulation (R,6,D) for all blocks, and the embedding itself for the final norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(width)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        embedded = self.emb["timestep_embedder"](t, dtype)
        return self.linear(F.silu(embedded)).unflatten(1, (6, -1)), embedded


class GuidedTimeEmbed(nn.Module):
    """adaLN-single whose embedding also carries the guidance scale (SANA-Sprint)."""

    def __init__(self, width: int, guidance_embeds_scale: float) -> None:
        super().__init__()
        self.guidance_embeds_scale = guidance_embeds_scale
        self.timestep_embedder = TimestepEmbedder(width)
        self.guidance_embedder = TimestepEmbedder(width)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor, guidance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # The product is fp32, as in the native code. A diffusers pipeline rounds it to its text encoder's type.
        scaled = guidance * self.guidance_embeds_scale
        embedded = self.timestep_embedder(t, dtype) + self.guidance_embedder(scaled, dtype)
        return self.linear(F.silu(embedded)).unflatten(1, (6, -1)), embedded
