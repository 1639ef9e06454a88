"""The settings of a SANA-Video transformer, as diffusers' transformer/config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditc.export.families.sana.config import QK_NORM
from ditc.export.networks.config import read_config
from ditc.runtime.errors import CheckpointError

FETCH = "transformer/config.json is damaged or was edited, or the model is not a SANA-Video: fetch it again"
LEAST_HEAD_DIM = 6  # frame, row and column have at least one pair of channels each
# Settings that neither diffusers' network nor its pipelines use.
IGNORED = ("dropout", "interpolation_scale", "guidance_embeds_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class SanaVideoConfig:
    """The transformer's settings. Names and defaults are those of diffusers 0.42.1's SanaVideoTransformer3DModel.

    Attributes:
        sample_size: which table of sizes the pipeline chooses from: 30 for 480p, 22 for 720p.
        patch_size: frames, rows and columns of latents in one token.
        rope_max_seq_len: the most frames, rows or columns of tokens.
    """

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 20
    attention_head_dim: int = 112
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False
    sample_size: int = 30
    patch_size: tuple[int, ...] = (1, 2, 2)
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    guidance_embeds: bool = False
    qk_norm: str | None = QK_NORM
    rope_max_seq_len: int = 1024

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def cross_width(self) -> int:
        """Channels of cross-attention's q, k and v."""
        return self.num_cross_attention_heads * self.cross_attention_head_dim

    @property
    def patch_side(self) -> int:
        """Rows and columns of latents in one token."""
        return self.patch_size[-1]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SanaVideoConfig:
        """Parse transformer/config.json.

        Raises:
            CheckpointError: a setting is unknown, or the networks here do not implement it.
        """
        values = {**values}
        values["out_channels"] = values.get("out_channels", 16) or values.get("in_channels", 16)
        config = read_config(cls, values, ignored=IGNORED)
        for wrong, what in (
            (
                config.out_channels not in (config.in_channels, 2 * config.in_channels),
                f"out_channels is {config.out_channels}, but must be {config.in_channels} like in_channels, or twice "
                "that, where the second half is a learned variance",
            ),
            (
                config.qk_norm not in (None, QK_NORM),
                f"qk_norm is {config.qk_norm!r}, but only None and {QK_NORM!r} are implemented",
            ),
            (
                config.cross_attention_dim != config.width,
                f"cross_attention_dim is {config.cross_attention_dim}, but captions are projected to {config.width}",
            ),
            (
                config.patch_size != (1, config.patch_side, config.patch_side),
                f"patch_size is {config.patch_size}, but only square patches of one frame are implemented",
            ),
            (
                config.attention_head_dim % 2 or config.attention_head_dim < LEAST_HEAD_DIM,
                f"attention_head_dim is {config.attention_head_dim}, but rotary positions need an even one from "
                f"{LEAST_HEAD_DIM} on",
            ),
            (
                config.guidance_embeds,
                "guidance_embeds is true, but no pipeline of diffusers gives a video network a guidance scale",
            ),
        ):
            if wrong:
                raise CheckpointError(what, hint=FETCH)
        return config
