"""SD3's and SD3.5's transformer (MMDiT, MMDiT-X) as an export-grade network.

The reference is diffusers 0.42.1's SD3Transformer2DModel; the paper is Scaling Rectified Flow Transformers
(arXiv 2403.03206). SD3.5 adds qk-norm, and SD3.5-medium a second self-attention of the image in its first blocks.

fp32 in 16-bit networks: norm statistics, softmax, sinusoids, and the blocks that the config calls wide.
"""

# R rows, C latent channels, H/W latent size, h/w tokens a side, N = h*w image tokens, S text tokens, D width

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.families.sd3.config import Sd3Config as Sd3Config
from ditc.export.graph.ops.attention.torch_op import attention
from ditc.export.networks.layers import (
    ConvAsLinear,
    LayerNorm,
    RMSNorm,
    TimestepEmbedder,
    from_patches,
    to_patches,
)
from ditc.export.networks.loading import build_empty, load_strict

NORM_EPS = 1e-6  # of every norm of the network; diffusers reads none of them from the config
FF_RATIO = 4


def load_sd3(
    config: Sd3Config,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    skip_layers: Sequence[int] = (),
    stage: str = "denoiser",
) -> Sd3Transformer:
    """The network with the weights of a diffusers transformer/ directory.

    Args:
        dtype: of everything but the config's wide blocks, which stay fp32 in an fp16 network.
        skip_layers: blocks that a row's skip_gate switches off; the network then has that input.
        stage: what an error calls it.

    Raises:
        CheckpointError: a tensor is missing, left over or misshapen. UsageError: a skip layer that is no block.
    """
    config.check_skip_layers(tuple(skip_layers))
    network = build_empty(lambda: Sd3Transformer(config, skip_layers))
    wide = config.wide_blocks if dtype == torch.float16 else ()
    load_strict(
        {stage: network},
        tensors,
        dtype,
        exceptions={f"transformer_blocks.{index}": torch.float32 for index in wide},
    )
    return network


class Sd3Transformer(nn.Module):
    """Predicts the velocity of the latents from the timestep and the text.

    Args:
        skip_layers: blocks that a row skips where its gate is 1 (skip-layer guidance).
    """

    weights_below = ""

    def __init__(self, config: Sd3Config, skip_layers: Sequence[int] = ()) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.patch_size = patch
        self.skip_layers = frozenset(skip_layers)
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbed(width, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, width)
        last = config.num_layers - 1
        self.transformer_blocks = nn.ModuleList(
            JointBlock(config, dual=i in config.dual_attention_layers, last=i == last)
            for i in range(config.num_layers)
        )
        self.norm_out = AdaNorm(width, 2)
        self.proj_out = nn.Linear(width, patch * patch * config.out_channels)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text_embeds: Tensor,
        pooled_projections: Tensor,
        skip_gate: Tensor | None = None,
    ) -> Tensor:
        """Predict from one step's inputs.

        Args:
            latents: (R,C,H,W) in the network's dtype. timestep: (R,) fp32, 0 to 1000.
            text_embeds: (R,S,joint_attention_dim), all of them seen: there is no mask.
            pooled_projections: (R,pooled_projection_dim).
            skip_gate: (R,) fp32; 1 for a row that skips the network's skip_layers, 0 for one that does not.

        Returns:
            (R,out_channels,H,W) in the network's dtype.
        """
        height, width = latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size
        image_RND = self.pos_embed(latents, height, width)
        dtype = image_RND.dtype
        time_RD = F.silu(self.time_text_embed(timestep, pooled_projections.to(dtype)))
        text_RSD = self.context_embedder(text_embeds.to(dtype))
        for index, block in enumerate(self.transformer_blocks):
            streams = block(image_RND, text_RSD, time_RD)
            if skip_gate is not None and index in self.skip_layers:
                streams = _unless(skip_gate, streams, (image_RND, text_RSD))
            image_RND, text_RSD = streams
        modulated, _ = self.norm_out(image_RND, time_RD)
        return from_patches(self.proj_out(modulated), self.patch_size, height, width)


def _unless(
    gate_R: Tensor, after: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Both streams as they were before, in the rows whose gate is up: what diffusers' skip_layers does to a batch."""
    skipped = (gate_R > 0.5)[:, None, None]
    image, text = (torch.where(skipped, old, new) for old, new in zip(before, after, strict=True))
    return image, text


class PatchEmbed(nn.Module):
    """Patches of the latents plus the centre of a stored position embedding."""

    def __init__(self, config: Sd3Config) -> None:
        super().__init__()
        self.max_size = config.pos_embed_max_size
        self.patch_size = config.patch_size
        self.proj = ConvAsLinear(config.in_channels, config.width, config.patch_size)
        self.register_buffer("pos_embed", torch.zeros(1, self.max_size**2, config.width))

    def forward(self, latents: Tensor, height: int, width: int) -> Tensor:
        """(R,C,h*p,w*p) -> (R,h*w,D)."""
        tokens: Tensor = self.proj(to_patches(latents, self.patch_size))
        return tokens + self._centre(height, width)

    def _centre(self, height: int, width: int) -> Tensor:
        """(1,h*w,D): the middle of the square of max_size; an odd rest goes to the bottom and the right."""
        table: Tensor = self.pos_embed.unflatten(1, (self.max_size, self.max_size))
        top, left = self._before(height), self._before(width)
        return table[:, top : top + height, left : left + width].flatten(1, 2)

    def _before(self, side: int) -> int:
        """(max_size - side) // 2, without a negative number: torch.export would write max_size//2 + (-side)//2, and
        ONNX's Div truncates where Python floors (torch 2.13), one row off for an odd side."""
        return self.max_size // 2 - (side + 1 - self.max_size % 2) // 2


class TimeTextEmbed(nn.Module):
    """Embedded timestep plus projected pooled text."""

    def __init__(self, width: int, pooled_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)
        self.text_embedder = PooledEmbedder(pooled_dim, width)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        embedded: Tensor = self.timestep_embedder(timestep, pooled.dtype) + self.text_embedder(pooled)
        return embedded


class PooledEmbedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, pooled: Tensor) -> Tensor:
        hidden: Tensor = self.linear_2(F.silu(self.linear_1(pooled)))
        return hidden


class AdaNorm(nn.Module):
    """LayerNorm without weights, modulated by the timestep; it gives what diffusers' adaptive norms give.

    The chunks are in diffusers' order: shift before scale in a block, scale before shift in the last layers (its
    AdaLayerNormContinuous). Stability's files have shift first everywhere.

    Args:
        chunks: 2 in the last layers; 6 in a block; 9 in one with a second self-attention (SD35AdaLayerNormZeroX).
    """

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width)
        self.norm = LayerNorm(width, NORM_EPS)

    def forward(self, x_RND: Tensor, time_RD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The modulated tokens, and factors (R,1,D) for later; of 9 chunks also the second tokens and their gate."""
        normed, factors = self.norm(x_RND), self.linear(time_RD)[:, None].chunk(self.chunks, dim=2)
        if self.chunks == 2:
            scale, shift = factors
            return normed * (1 + scale) + shift, ()
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = factors
        rest: tuple[Tensor, ...] = (gate, shift_ff, scale_ff, gate_ff)
        if second:
            second_shift, second_scale, second_gate = second
            rest = (*rest, normed * (1 + second_scale) + second_shift, second_gate)
        return normed * (1 + scale) + shift, rest


class JointBlock(nn.Module):
    """One attention over image and text together, then each stream's own feed-forward.

    Args:
        dual: the image stream also attends to itself alone (MMDiT-X).
        last: the text stream ends here.
    """

    def __init__(self, config: Sd3Config, *, dual: bool, last: bool) -> None:
        super().__init__()
        self.last = last
        self.norm1 = AdaNorm(config.width, 9 if dual else 6)
        self.norm1_context = AdaNorm(config.width, 2 if last else 6)
        self.attn = JointAttention(config, last=last)
        self.attn2 = SelfAttention(config) if dual else None
        self.norm2 = LayerNorm(config.width, NORM_EPS)
        self.ff = FeedForward(config.width)
        if not last:
            self.norm2_context = LayerNorm(config.width, NORM_EPS)
            self.ff_context = FeedForward(config.width)

    def forward(self, image_RND: Tensor, text_RSD: Tensor, time_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams after the block, in the type they came in; the block computes in its weights' type."""
        dtype, wide = image_RND.dtype, self.norm1.linear.weight.dtype
        image, text = self._forward(image_RND.to(wide), text_RSD.to(wide), time_RD.to(wide))
        return image.to(dtype), text.to(dtype)

    def _forward(self, image: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        modulated, (gate, shift_ff, scale_ff, gate_ff, *second) = self.norm1(image, time)
        modulated_text, rest = self.norm1_context(text, time)
        out, text_out = self.attn(modulated, modulated_text)
        image = image + gate * out
        if self.attn2 is not None:
            modulated, gate = second
            image = image + gate * self.attn2(modulated)
        image = image + gate_ff * self.ff(self.norm2(image) * (1 + scale_ff) + shift_ff)
        if self.last:
            return image, text
        gate, shift_ff, scale_ff, gate_ff = rest
        text = text + gate * text_out
        return image, text + gate_ff * self.ff_context(self.norm2_context(text) * (1 + scale_ff) + shift_ff)


class SelfAttention(nn.Module):
    """Softmax attention of one stream; qk-norm is over a head."""

    def __init__(self, config: Sd3Config) -> None:
        super().__init__()
        width, head_dim = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.scale = head_dim**-0.5
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_q = _qk_norm(config)
        self.norm_k = _qk_norm(config)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, image_RND: Tensor) -> Tensor:
        out: Tensor = self.to_out[0](attention(*self._qkv(image_RND), self.scale).flatten(2))
        return out

    def _qkv(self, image_RND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R,N,heads,head_dim) each."""
        q, k, v = (self._split(linear(image_RND)) for linear in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def _split(self, x_RND: Tensor) -> Tensor:
        return x_RND.unflatten(2, (self.heads, -1))


class JointAttention(SelfAttention):
    """One softmax attention over both streams, image before text, each with projections of its own."""

    def __init__(self, config: Sd3Config, *, last: bool) -> None:
        super().__init__(config)
        width = config.width
        self.add_q_proj = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.norm_added_q = _qk_norm(config)
        self.norm_added_k = _qk_norm(config)
        self.to_add_out = nn.Identity() if last else nn.Linear(width, width)

    def forward(self, image_RND: Tensor, text_RSD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        joint = (
            torch.cat(pair, dim=1)
            for pair in zip(self._qkv(image_RND), self._text_qkv(text_RSD), strict=True)
        )
        out = attention(*joint, self.scale).flatten(2)
        count = image_RND.shape[1]
        return self.to_out[0](out[:, :count]), self.to_add_out(out[:, count:])

    def _text_qkv(self, text_RSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projections = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (self._split(linear(text_RSD)) for linear in projections)
        return self.norm_added_q(q), self.norm_added_k(k), v


def _qk_norm(config: Sd3Config) -> nn.Module:
    return nn.Identity() if config.qk_norm is None else RMSNorm(config.attention_head_dim, NORM_EPS)


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear, under diffusers' names: net.0.proj and net.2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GeluLinear(width, FF_RATIO * width), nn.Identity(), nn.Linear(FF_RATIO * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class GeluLinear(nn.Module):
    """GELU (tanh form) of a Linear."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")
