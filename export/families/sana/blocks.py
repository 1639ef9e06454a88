"""One block of Sana's denoiser: linear self-attention, cross-attention to text, Mix-FFN.

SANA-Video has the same attentions, and its block is in video_blocks.py.
"""

# R rows, h/w tokens per side, N = h*w tokens, S text tokens, D width

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditc.export.families.sana.config import SanaConfig
from ditc.export.families.sana.video_config import SanaVideoConfig
from ditc.export.graph.ops.relu_linear_attention.torch_op import DIFFUSERS_EPS, relu_linear_attention
from ditc.export.graph.ops.rotary_linear_attention.torch_op import rotary_linear_attention
from ditc.export.networks.layers import GLUMBConv, LayerNorm, RMSNorm

QK_NORM_EPS = 1e-5  # diffusers' Attention default, for both attentions; the native code has 1e-6
FP16_MAX = 65504.0


class DenoiserBlock(nn.Module):
    """Linear self-attention, cross-attention without a norm or a gate, Mix-FFN.

    Args:
        perturbed: whether self-attention is the identity in rows whose skip_gate is 1 (perturbed-attention guidance).
    """

    def __init__(self, config: SanaConfig, *, perturbed: bool = False) -> None:
        super().__init__()
        self.perturbed = perturbed
        self.scale_shift_table = nn.Parameter(torch.zeros(6, config.width))
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attn1 = LinearSelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = LayerNorm(config.width, config.norm_eps, affine=config.norm_elementwise_affine)
        self.ff = GLUMBConv(config.width, config.mlp_ratio)

    def forward(
        self,
        x_RND: Tensor,
        modulation_R6D: Tensor,
        key_RSD: Tensor,
        value_RSD: Tensor,
        mask_R11S: Tensor,
        height: int,
        width: int,
        skip_gate_R: Tensor | None = None,
    ) -> Tensor:
        modulation = (self.scale_shift_table + modulation_R6D).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        attended = self.attn1(self.norm1(x_RND) * (1 + scale_msa) + shift_msa, skip_gate_R)
        x_RND = x_RND + gate_msa * attended
        x_RND = x_RND + self.attn2(x_RND, key_RSD, value_RSD, mask_R11S)
        return x_RND + gate_mlp * self.ff(self.norm2(x_RND) * (1 + scale_mlp) + shift_mlp, height, width)


class LinearSelfAttention(nn.Module):
    """ReLU linear attention with its projections. qk-norm covers the full width, before the split into heads."""

    def __init__(self, config: SanaConfig | SanaVideoConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(width, width, bias=config.attention_bias)
        self.to_k = nn.Linear(width, width, bias=config.attention_bias)
        self.to_v = nn.Linear(width, width, bias=config.attention_bias)
        self.norm_q = RMSNorm(width, QK_NORM_EPS) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(width, QK_NORM_EPS) if config.qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self, x_RND: Tensor, skip_gate_R: Tensor | None = None, tables: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """(R,N,D) -> (R,N,D). In rows whose gate is 1, every token keeps its own value instead of a mean of values.

        diffusers' PAGCFGSanaLinearAttnProcessor2_0 computes the same, but leaves out the norms of q and k in all rows,
        which is another function for networks with qk-norm (SANA-1.5).

        Args:
            tables: cosines and sines (N,D/2 of a head) of rotary positions, where there are any.
        """
        q, k, v = self.norm_q(self.to_q(x_RND)), self.norm_k(self.to_k(x_RND)), self.to_v(x_RND)
        q, k, v = (y.unflatten(2, (self.heads, -1)) for y in (q, k, v))
        attend = rotary_linear_attention if tables else relu_linear_attention
        mixed = attend(q, k, v, *tables, DIFFUSERS_EPS).flatten(2)
        if skip_gate_R is not None:
            mixed = torch.where((skip_gate_R > 0.5)[:, None, None], v.flatten(2), mixed)
        out: Tensor = self.to_out[0](mixed)
        # diffusers and the native code clamp here too, because the projection can exceed fp16's range.
        return out.clamp(-FP16_MAX, FP16_MAX) if out.dtype == torch.float16 else out


class CrossAttention(nn.Module):
    """Softmax attention over the text, whose K and V are inputs. Mask and softmax are fp32."""

    def __init__(self, config: SanaConfig | SanaVideoConfig) -> None:
        super().__init__()
        self.heads = config.num_cross_attention_heads
        self.scale = config.cross_attention_head_dim**-0.5
        self.to_q = nn.Linear(config.width, config.cross_width)
        self.norm_q = RMSNorm(config.cross_width, QK_NORM_EPS) if config.qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(config.cross_width, config.width)])

    def forward(self, x_RND: Tensor, key_RSD: Tensor, value_RSD: Tensor, mask_R11S: Tensor) -> Tensor:
        # Scaled before the product, because unscaled scores can exceed fp16's range.
        q = self.norm_q(self.to_q(x_RND)) * self.scale
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, key_RSD, value_RSD))
        # softmax(x.float()), because F.softmax(x, dtype=torch.float32) exports as a 16-bit Softmax (torch 2.13).
        weights = torch.softmax((q @ k.transpose(2, 3)).float() + mask_R11S, dim=-1).to(v.dtype)
        out: Tensor = self.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
        return out
