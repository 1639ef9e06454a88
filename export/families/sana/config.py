"""The settings of a Sana transformer, as diffusers' transformer/config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditc.export.networks.config import read_config
from ditc.runtime.errors import CheckpointError

FETCH = "transformer/config.json is damaged or was edited, or the model is not a Sana: fetch it again"
QK_NORM = "rms_norm_across_heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class SanaConfig:
    """The transformer's settings. Names and defaults are those of diffusers 0.42.1's SanaTransformer2DModel.

    The caller applies timestep_scale, so the network sees scaled timesteps.
    """

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def cross_width(self) -> int:
        """Channels of cross-attention's q, k and v."""
        return self.num_cross_attention_heads * self.cross_attention_head_dim

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SanaConfig:
        """Parse transformer/config.json.

        Raises:
            CheckpointError: a setting is unknown, or the networks here do not implement it.
        """
        values = {**values}
        values["out_channels"] = values.get("out_channels", 32) or values.get("in_channels", 32)
        config = read_config(cls, values, ignored=("dropout",))
        if config.out_channels not in (config.in_channels, 2 * config.in_channels):
            raise CheckpointError(
                f"out_channels is {config.out_channels}, but must be {config.in_channels} like in_channels, or twice "
                "that, where the second half is a learned variance",
                hint=FETCH,
            )
        if config.qk_norm not in (None, QK_NORM):
            raise CheckpointError(
                f"qk_norm is {config.qk_norm!r}, but only None and {QK_NORM!r} are implemented",
                hint=FETCH,
            )
        if config.cross_attention_dim != config.width:
            raise CheckpointError(
                f"cross_attention_dim is {config.cross_attention_dim}, but captions are projected to {config.width}",
                hint=FETCH,
            )
        if config.interpolation_scale is not None and (config.width % 4 or config.interpolation_scale <= 0):
            raise CheckpointError(
                f"a position embedding needs a width divisible by 4, not {config.width}, and a positive "
                f"interpolation_scale, not {config.interpolation_scale}",
                hint=FETCH,
            )
        return config
