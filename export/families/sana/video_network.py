"""SANA-Video's denoiser as an export-grade network. Its conditioner is Sana's own, SanaConditioner.

The reference is diffusers 0.42.1's SanaVideoTransformer3DModel; the paper is SANA-Video (arXiv 2509.24695). It differs
from Sana's denoiser in three ways: self-attention is over all frames with rotary positions, the Mix-FFN also mixes
neighbouring frames, and each frame may have a timestep of its own, as image-to-video needs.

These stay fp32 in 16-bit networks: norm statistics, linear attention, softmax, sinusoids, text_bias.
"""

# R rows, C latent channels, F frames, H/W latent size, h/w tokens per side, S = h*w tokens per frame, D width

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ditc.export.families.sana.network import FINAL_NORM_EPS, SanaConditioner, TimeEmbed
from ditc.export.families.sana.video_blocks import VideoDenoiserBlock
from ditc.export.families.sana.video_config import SanaVideoConfig as SanaVideoConfig
from ditc.export.networks.layers import FrameConvAsLinear, LayerNorm, from_patches, to_patches
from ditc.export.networks.loading import build_empty, check_layers, load_strict
from ditc.export.networks.position import RotaryPosition3d


def load_sana_video(
    config: SanaVideoConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[SanaConditioner, SanaVideoDenoiser]:
    """Load both networks with the weights of a diffusers transformer/ directory, in dtype.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    check_layers("num_layers", config.num_layers, tensors, "transformer_blocks")
    conditioner = build_empty(lambda: SanaConditioner(config))
    denoiser = build_empty(lambda: SanaVideoDenoiser(config))
    load_strict({"conditioner": conditioner, "denoiser": denoiser}, tensors, dtype)
    return conditioner, denoiser


class SanaVideoDenoiser(nn.Module):
    """Predicts the velocity of the latents from the timesteps and a conditioner's outputs."""

    weights_below = ""

    def __init__(self, config: SanaVideoConfig) -> None:
        super().__init__()
        width, patch = config.width, config.patch_side
        self.patch_size = patch
        self.position = RotaryPosition3d(config.attention_head_dim, config.rope_max_seq_len)
        self.patch_embedding = FrameConvAsLinear(config.in_channels, width, patch)
        self.time_embed = TimeEmbed(width)
        self.transformer_blocks = nn.ModuleList(VideoDenoiserBlock(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.norm_out = LayerNorm(width, FINAL_NORM_EPS)
        self.proj_out = nn.Linear(width, patch * patch * config.out_channels)

    def forward(self, latents: Tensor, t: Tensor, cross_kv: Tensor, text_bias: Tensor) -> Tensor:
        """Predict from one step's inputs.

        Args:
            latents: (R,C,F,H,W) in the network's dtype.
            t: (R,) fp32, or (R,F) where frames have timesteps of their own. diffusers takes one for every token there,
                but its image-to-video pipeline gives the tokens of a frame the same.
            cross_kv, text_bias: as SanaConditioner returns them.

        Returns:
            (R,out_channels,F,H,W) in the network's dtype.
        """
        rows, _, frames = latents.shape[:3]
        height, width = latents.shape[3] // self.patch_size, latents.shape[4] // self.patch_size
        pictures = latents.transpose(1, 2).flatten(0, 1)
        x_RFSD = self.patch_embedding(to_patches(pictures, self.patch_size)).unflatten(0, (rows, frames))
        modulation_RT6D, embedded_RTD = self._embedded(t, x_RFSD.dtype)
        cos, sin = self.position(frames, height, width, x_RFSD.device)
        mask_R11L = text_bias[:, None, None, :]
        keys_values = cross_kv.flatten(1, 2).unbind(1)  # one Split in the graph, as in SanaDenoiser
        for block, key, value in zip(
            self.transformer_blocks, keys_values[::2], keys_values[1::2], strict=True
        ):
            x_RFSD = block(x_RFSD, modulation_RT6D, key, value, mask_R11L, cos, sin, frames, height, width)
        shift, scale = (self.scale_shift_table + embedded_RTD[:, :, None]).chunk(2, dim=2)
        x_RFSD = self.proj_out(self.norm_out(x_RFSD) * (1 + scale) + shift)
        pictures = from_patches(x_RFSD.flatten(0, 1), self.patch_size, height, width)
        return pictures.unflatten(0, (rows, frames)).transpose(1, 2)

    def _embedded(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The modulation (R,T,6,D) of all blocks and the embedding (R,T,D) itself, where T is 1 or F."""
        modulation, embedded = self.time_embed(t.flatten(), dtype)
        if t.dim() == 1:
            return modulation[:, None], embedded[:, None]
        return modulation.unflatten(0, t.shape), embedded.unflatten(0, t.shape)
