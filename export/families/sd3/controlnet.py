"""SD3's ControlNet as an export-grade network, in the two forms that diffusers 0.42.1's SD3ControlNetModel has.

With text (InstantX's for SD3-medium), it is the first blocks of SD3's transformer, which also see the control picture.
Without text (Stability's for SD3.5-large), its blocks are of the image alone, and it takes the transformer's position
embedding. Each block is followed by a linear layer.
"""

# R rows, C latent channels, H/W latent size, h/w tokens per side, N = h*w tokens, S text tokens, D width

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.families.sd3.blocks import NORM_EPS, AdaNorm, FeedForward, JointBlock, SelfAttention
from ditc.export.families.sd3.config import FETCH, Sd3Config
from ditc.export.families.sd3.network import PatchEmbed, TimeTextEmbed
from ditc.export.networks.config import read_config
from ditc.export.networks.layers import ConvAsLinear, LayerNorm, to_patches
from ditc.export.networks.loading import Without, build_empty, check_layers, load_strict
from ditc.runtime.errors import CheckpointError

POSITION = "pos_embed."  # what the names of a position embedding's tensors begin with


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSettings:
    """The settings that a transformer does not have. Names and defaults are those of diffusers 0.42.1."""

    extra_conditioning_channels: int = 0
    pos_embed_type: str | None = "sincos"
    use_pos_embed: bool = True
    force_zeros_for_pooled_projection: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """A ControlNet's settings.

    Attributes:
        network: those that a transformer has too.
        reads_text: whether its blocks are those of the transformer, over text and image.
        own_position: whether it has a position embedding; if not, it takes the transformer's.
        reads_pooled: whether it reads the prompt's pooled embeddings; if not, it reads zeros in their place, and the
            control picture is encoded without the VAE's shift_factor, as in StableDiffusion3ControlNetPipeline.
    """

    network: Sd3Config
    reads_text: bool
    own_position: bool
    reads_pooled: bool

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ControlConfig:
        """Parse controlnet/config.json.

        Raises:
            CheckpointError: a setting is unknown, or the network here does not implement it.
        """
        own = {field.name for field in fields(ControlSettings)}
        given = {name: value for name, value in values.items() if name in own}
        settings = read_config(
            ControlSettings, given, ignored=(), may_be_zero=("extra_conditioning_channels",)
        )
        others = {name: value for name, value in values.items() if name not in own}
        reads_text = others.get("joint_attention_dim", 0) is not None
        unused = [] if reads_text else ["joint_attention_dim", "caption_projection_dim"]
        if not settings.use_pos_embed:
            unused.append("pos_embed_max_size")
        others = {name: value for name, value in others.items() if name not in unused}
        if settings.extra_conditioning_channels:
            raise CheckpointError(
                f"extra_conditioning_channels is {settings.extra_conditioning_channels}, but only 0 is implemented: "
                "such a ControlNet is made for inpainting",
                hint=FETCH,
            )
        if settings.use_pos_embed and settings.pos_embed_type != "sincos":
            raise CheckpointError(
                f"pos_embed_type is {settings.pos_embed_type!r}, but only 'sincos' is implemented", hint=FETCH
            )
        return cls(
            network=Sd3Config.from_json(others, has_text=reads_text),
            reads_text=reads_text,
            own_position=settings.use_pos_embed,
            reads_pooled=not settings.force_zeros_for_pooled_projection,
        )

    def beside(self, transformer: Sd3Config) -> ControlConfig:
        """The settings with the transformer's position embedding, where the ControlNet has none of its own."""
        if self.own_position:
            return self
        return replace(self, network=replace(self.network, pos_embed_max_size=transformer.pos_embed_max_size))


def load_control(
    config: ControlConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Sd3ControlNet:
    """Load the network with the weights that `control_tensors` returns.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    check_layers("num_layers", config.network.num_layers, tensors, "transformer_blocks")
    network = build_empty(lambda: Sd3ControlNet(config))
    load_strict({"controlnet": network}, tensors, dtype)
    return network


def control_tensors(
    config: ControlConfig, tensors: Mapping[str, Tensor], transformer: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The ControlNet's tensors, with the transformer's position embedding where it has none of its own.

    Those that compute the text after the last block are left out, because nothing reads that text.
    """
    if config.reads_text:
        last = f"transformer_blocks.{config.network.num_layers - 1}"
        unused = (f"{last}.attn.to_add_out.", f"{last}.ff_context.")
        tensors = Without(tensors, *(name for name in tensors if name.startswith(unused)))
    if config.own_position:
        return tensors
    shared = {name: transformer[name] for name in transformer if name.startswith(POSITION)}
    return ChainMap({**shared}, tensors)  # type: ignore[arg-type]  # ChainMap only reads the second map


class Sd3ControlNet(nn.Module):
    """Computes what is added to the denoiser's tokens, one tensor (R,N,D) for each of its own blocks."""

    weights_below = ""

    def __init__(self, config: ControlConfig) -> None:
        super().__init__()
        network = config.network
        width, patch, layers = network.width, network.patch_size, network.num_layers
        self.patch_size, self.pooled_width = patch, network.pooled_projection_dim
        self.reads_text, self.reads_pooled = config.reads_text, config.reads_pooled
        self.pos_embed = PatchEmbed(network)
        self.pos_embed_input = nn.ModuleDict({"proj": ConvAsLinear(network.in_channels, width, patch)})
        self.time_text_embed = TimeTextEmbed(width, network.pooled_projection_dim)
        if config.reads_text:
            self.context_embedder = nn.Linear(network.joint_attention_dim, width)
            self.transformer_blocks = nn.ModuleList(
                JointBlock(network, dual=index in network.dual_attention_layers, last=False)
                for index in range(layers)
            )
            _end_text(self.transformer_blocks[-1])
        else:
            self.transformer_blocks = nn.ModuleList(ImageBlock(network) for _ in range(layers))
        self.controlnet_blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, latents: Tensor, timestep: Tensor, control: Tensor, *texts: Tensor) -> list[Tensor]:
        """Compute from one step's inputs.

        Args:
            latents, control: (R,C,H,W) in the network's dtype. control is the encoded control picture.
            timestep: (R,) fp32, 0 to 1000.
            texts: text_embeds (R,S,joint_attention_dim) if it reads texts, then pooled_projections
                (R,pooled_projection_dim) if it reads those.
        """
        height, width = latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size
        image_RND = self.pos_embed(latents, height, width)
        dtype = image_RND.dtype
        image_RND = image_RND + self.pos_embed_input["proj"](to_patches(control, self.patch_size))
        pooled = texts[-1].to(dtype) if self.reads_pooled else self._no_pooled(timestep, dtype)
        time_RD = F.silu(self.time_text_embed(timestep, pooled))
        text_RSD = self.context_embedder(texts[0].to(dtype)) if self.reads_text else None
        after = []
        for block in self.transformer_blocks:
            if text_RSD is None:
                image_RND = block(image_RND, time_RD)
            else:
                image_RND, text_RSD = block(image_RND, text_RSD, time_RD)
            after.append(image_RND)
        return [layer(tokens) for layer, tokens in zip(self.controlnet_blocks, after, strict=True)]

    def _no_pooled(self, timestep_R: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros((timestep_R.shape[0], self.pooled_width), dtype=dtype, device=timestep_R.device)


def _end_text(block: JointBlock) -> None:
    """Leave out of a block what computes its text, but for what the image attends to."""
    block.last = True
    block.attn.to_add_out = None
    del block.norm2_context, block.ff_context


class ImageBlock(nn.Module):
    """A block without text: self-attention and a feed-forward (SD3SingleTransformerBlock). It has no qk-norm."""

    def __init__(self, config: Sd3Config) -> None:
        super().__init__()
        self.norm1 = AdaNorm(config.width, 6)
        self.attn = SelfAttention(replace(config, qk_norm=None))
        self.norm2 = LayerNorm(config.width, NORM_EPS)
        self.ff = FeedForward(config.width)

    def forward(self, image_RND: Tensor, time_RD: Tensor) -> Tensor:
        modulated, (gate, shift_ff, scale_ff, gate_ff) = self.norm1(image_RND, time_RD)
        image_RND = image_RND + gate * self.attn(modulated)
        return image_RND + gate_ff * self.ff(self.norm2(image_RND) * (1 + scale_ff) + shift_ff)
