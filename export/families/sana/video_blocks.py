"""One block of SANA-Video's denoiser: rotary linear attention, cross-attention to text, Mix-FFN over frames."""

# R rows, F frames, S = h*w tokens per frame, N = F*S tokens, T = F or 1 timesteps, D width

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditc.export.families.sana.blocks import CrossAttention, LinearSelfAttention
from ditc.export.families.sana.video_config import SanaVideoConfig
from ditc.export.networks.layers import GLUMBConv, LayerNorm


class VideoDenoiserBlock(nn.Module):
    """Rotary linear self-attention over all frames, cross-attention without a norm or a gate, Mix-FFN."""

    def __init__(self, config: SanaVideoConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, config.width))
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attn1 = LinearSelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = LayerNorm(config.width, config.norm_eps, affine=config.norm_elementwise_affine)
        self.ff = GLUMBTempConv(config.width, config.mlp_ratio)

    def forward(
        self,
        x_RFSD: Tensor,
        modulation_RT6D: Tensor,
        key_RLD: Tensor,
        value_RLD: Tensor,
        mask_R11L: Tensor,
        cos: Tensor,
        sin: Tensor,
        frames: int,
        height: int,
        width: int,
    ) -> Tensor:
        """L text tokens. Frames with timesteps of their own (T = F) are modulated one by one."""
        modulation = (self.scale_shift_table + modulation_RT6D).chunk(6, dim=2)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        by_frame = (frames, height * width)
        inputs = (self.norm1(x_RFSD) * (1 + scale_msa) + shift_msa).flatten(1, 2)
        attended = self.attn1(inputs, tables=(cos, sin))
        x_RFSD = x_RFSD + gate_msa * attended.unflatten(1, by_frame)
        attended = self.attn2(x_RFSD.flatten(1, 2), key_RLD, value_RLD, mask_R11L)
        x_RFSD = x_RFSD + attended.unflatten(1, by_frame)
        mixed = self.ff(self.norm2(x_RFSD) * (1 + scale_mlp) + shift_mlp, height, width)
        return x_RFSD + gate_mlp * mixed


class GLUMBTempConv(GLUMBConv):
    """Mix-FFN on every frame, then a convolution over three neighbouring frames with a residual.

    It is diffusers' GLUMBTempConv without the outer residual (SANA-Video, arXiv 2509.24695, section 3.2).
    """

    def __init__(self, dim: int, expand_ratio: float) -> None:
        super().__init__(dim, expand_ratio)
        self.conv_temp = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0), bias=False)

    def forward(self, x_RFSC: Tensor, height: int, width: int) -> Tensor:
        rows, frames = x_RFSC.shape[:2]
        mixed = super().forward(x_RFSC.flatten(0, 1), height, width).unflatten(0, (rows, frames))
        across_RCFS = self.conv_temp(mixed.permute(0, 3, 1, 2))
        return mixed + across_RCFS.permute(0, 2, 3, 1)
