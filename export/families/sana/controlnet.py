"""Sana's ControlNet as two export-grade networks: one depends on the text alone, the other runs in every step.

The reference is diffusers 0.42.1's SanaControlNetModel: the first blocks of Sana's transformer, which also see the
control picture, each followed by a linear layer.
"""

# R rows, C latent channels, H/W latent size, h/w tokens per side, N = h*w tokens, S text tokens, L layers, D width

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ditc.export.families.sana.blocks import DenoiserBlock
from ditc.export.families.sana.config import FETCH, SanaConfig
from ditc.export.families.sana.network import SanaConditioner, TimeEmbed
from ditc.export.networks.layers import ConvAsLinear, to_patches
from ditc.export.networks.loading import build_empty, check_layers, load_strict
from ditc.export.networks.position import SincosPosition
from ditc.runtime.errors import CheckpointError

# Settings of a transformer that SanaControlNetModel does not have.
_NOT_HERE = ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale")
DEFAULT_LAYERS = 7


def control_config(values: Mapping[str, Any]) -> SanaConfig:
    """Parse controlnet/config.json.

    Raises:
        CheckpointError: a setting is unknown, or the network here does not implement it.
    """
    foreign = [name for name in _NOT_HERE if name in values]
    if foreign:
        raise CheckpointError(
            f"{foreign[0]} = {values[foreign[0]]!r:.60} is not a setting of a SanaControlNetModel", hint=FETCH
        )
    return SanaConfig.from_json({"num_layers": DEFAULT_LAYERS, **values})


def load_control(
    config: SanaConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[SanaControlConditioner, SanaControlNet]:
    """Load both networks with the weights of a diffusers controlnet/ directory, in dtype.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    check_layers("num_layers", config.num_layers, tensors, "transformer_blocks")
    conditioner = build_empty(lambda: SanaControlConditioner(config))
    controlnet = build_empty(lambda: SanaControlNet(config))
    load_strict({"control_conditioner": conditioner, "controlnet": controlnet}, tensors, dtype)
    return conditioner, controlnet


class SanaControlConditioner(SanaConditioner):
    """Everything that depends on the text and not on the step: K and V of every cross-attention.

    The bias that masks padding is the transformer's.
    """

    def forward(self, text_embeds: Tensor) -> Tensor:  # type: ignore[override]
        """(R,S,caption_channels) -> control_kv (R,L,2,S,D) in the network's dtype."""
        return self.keys_values(text_embeds)


class SanaControlNet(nn.Module):
    """Computes what is added to the denoiser's tokens, one tensor (R,N,D) for each of its own blocks."""

    weights_below = ""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        width, patch, layers = config.width, config.patch_size, config.num_layers
        self.patch_size = patch
        self.position = None
        if config.interpolation_scale is not None:
            self.position = SincosPosition(width, config.sample_size // patch, config.interpolation_scale)
        self.patch_embed = nn.ModuleDict({"proj": ConvAsLinear(config.in_channels, width, patch)})
        self.input_block = nn.Linear(width, width)
        self.time_embed = TimeEmbed(width)
        self.transformer_blocks = nn.ModuleList(DenoiserBlock(config) for _ in range(layers))
        self.controlnet_blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(
        self, latents: Tensor, t: Tensor, control: Tensor, control_kv: Tensor, text_bias: Tensor
    ) -> list[Tensor]:
        """Compute from one step's inputs.

        Args:
            latents, control: (R,C,H,W) in the network's dtype. control is the encoded control picture.
            t: (R,) fp32.
            control_kv: as SanaControlConditioner returns it. text_bias: as SanaConditioner returns it.
        """
        height, width = latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size
        x_RND = self._tokens(latents, height, width)
        x_RND = x_RND + self.input_block(self._tokens(control, height, width))
        modulation_R6D, _ = self.time_embed(t, dtype=x_RND.dtype)
        mask_R11S = text_bias[:, None, None, :]
        keys_values = control_kv.flatten(1, 2).unbind(1)
        after = []
        for block, key_RSD, value_RSD in zip(
            self.transformer_blocks, keys_values[::2], keys_values[1::2], strict=True
        ):
            x_RND = block(x_RND, modulation_R6D, key_RSD, value_RSD, mask_R11S, height, width)
            after.append(x_RND)
        return [layer(tokens) for layer, tokens in zip(self.controlnet_blocks, after, strict=True)]

    def _tokens(self, latents: Tensor, height: int, width: int) -> Tensor:
        """(R,C,H,W) -> (R,N,D)."""
        tokens: Tensor = self.patch_embed["proj"](to_patches(latents, self.patch_size))
        if self.position is None:
            return tokens
        return (tokens + self.position(height, width, tokens.device)).to(tokens.dtype)
