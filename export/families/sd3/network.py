"""SD3's and SD3.5's transformer (MMDiT, MMDiT-X) as an export-grade network.

The reference is diffusers 0.42.1's SD3Transformer2DModel; the paper is Scaling Rectified Flow Transformers
(arXiv 2403.03206). SD3.5 adds qk-norm, and SD3.5-medium a second self-attention of the image in its first blocks.

These stay fp32 in 16-bit networks: norm statistics, softmax and sinusoids; in fp16 also the config's fp32_blocks.
"""

# R rows, C latent channels, H/W latent size, h/w tokens per side, N = h*w image tokens, S text tokens, D width

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.families.sd3.blocks import AdaNorm, JointBlock
from ditc.export.families.sd3.config import Sd3Config as Sd3Config
from ditc.export.networks.layers import (
    ConvAsLinear,
    TimestepEmbedder,
    from_patches,
    to_patches,
)
from ditc.export.networks.loading import build_empty, check_layers, load_strict


def load_sd3(
    config: Sd3Config,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    skip_layers: Sequence[int] = (),
    residuals: int = 0,
    stage: str = "denoiser",
) -> Sd3Transformer:
    """Load the network with the weights of a diffusers transformer/ directory.

    Args:
        dtype: dtype of everything but the config's fp32_blocks, which stay fp32 in an fp16 network.
        skip_layers: blocks that a row's skip_gate switches off. If there are any, the network has the input skip_gate.
        residuals: how many residuals of a ControlNet the network takes.
        stage: name of the stage, for error messages.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
        UsageError: a skip layer is not a block of the network.
    """
    config.check_skip_layers(tuple(skip_layers))
    check_layers("num_layers", config.num_layers, tensors, "transformer_blocks")
    network = build_empty(lambda: Sd3Transformer(config, skip_layers, residuals))
    fp32_blocks = config.fp32_blocks if dtype == torch.float16 else ()
    load_strict(
        {stage: network},
        tensors,
        dtype,
        exceptions={f"transformer_blocks.{index}": torch.float32 for index in fp32_blocks},
    )
    return network


class Sd3Transformer(nn.Module):
    """Predicts the velocity of the latents from the timestep and the text.

    Args:
        skip_layers: blocks that a row skips where its gate is 1 (skip-layer guidance).
        residuals: how many residuals of a ControlNet it takes, which are spread evenly over its blocks.
    """

    weights_below = ""

    def __init__(self, config: Sd3Config, skip_layers: Sequence[int] = (), residuals: int = 0) -> None:
        super().__init__()
        self.residual_of = residual_of_blocks(config.num_layers, residuals)
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
        *rest: Tensor,
    ) -> Tensor:
        """Predict from one step's inputs.

        Args:
            latents: (R,C,H,W) in the network's dtype.
            timestep: (R,) fp32, 0 to 1000.
            text_embeds: (R,S,joint_attention_dim). There is no mask: padding is attended to.
            pooled_projections: (R,pooled_projection_dim).
            rest: if the network has skip_layers, skip_gate (R,) fp32: 1 for a row that skips them, 0 for one that does
                not. Then the residuals (R,H,W,D/p^2), as export/graph/control.py returns them.

        Returns:
            (R,out_channels,H,W) in the network's dtype.
        """
        gates, residuals = (rest[:1], rest[1:]) if self.skip_layers else ((), rest)
        height, width = latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size
        image_RND = self.pos_embed(latents, height, width)
        dtype = image_RND.dtype
        time_RD = F.silu(self.time_text_embed(timestep, pooled_projections.to(dtype)))
        text_RSD = self.context_embedder(text_embeds.to(dtype))
        for index, block in enumerate(self.transformer_blocks):
            streams = block(image_RND, text_RSD, time_RD)
            if index in self.skip_layers:
                streams = _skip_block(gates[0], streams, (image_RND, text_RSD))
            image_RND, text_RSD = streams
            if index < len(self.residual_of):
                image_RND = image_RND + residuals[self.residual_of[index]].reshape(image_RND.shape)
        modulated, _ = self.norm_out(image_RND, time_RD)
        return from_patches(self.proj_out(modulated), self.patch_size, height, width)


def residual_of_blocks(blocks: int, residuals: int) -> list[int]:
    """For each block, the residual that is added after it. None is added after the last block.

    The rule is that of SD3Transformer2DModel's block_controlnet_hidden_states, with its float division.
    """
    if not residuals:
        return []
    interval = blocks / residuals
    return [int(index / interval) for index in range(blocks - 1)]


def _skip_block(
    gate_R: Tensor, after: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Both streams after a block. Rows whose gate is 1 keep their values from before it.

    diffusers' skip_layers does the same for a whole batch.
    """
    skipped = (gate_R > 0.5)[:, None, None]
    image, text = (torch.where(skipped, old, new) for old, new in zip(before, after, strict=True))
    return image, text


class PatchEmbed(nn.Module):
    """Embeds patches of the latents, and adds the centre of a stored position embedding."""

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
        """(1,h*w,D): the centre of the stored square. If it cannot be exact, it lies nearer to the top and the left."""
        table: Tensor = self.pos_embed.unflatten(1, (self.max_size, self.max_size))
        top, left = self._crop_start(height), self._crop_start(width)
        return table[:, top : top + height, left : left + width].flatten(1, 2)

    def _crop_start(self, side: int) -> int:
        """(max_size - side) // 2, computed without negative numbers.

        torch.export (2.13) writes the plain form as max_size//2 + (-side)//2. ONNX's Div truncates where Python floors,
        so the crop would be one row off for an odd side.
        """
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
