"""The settings of an SD3 or SD3.5 transformer, as diffusers' transformer/config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditc.export.networks.config import read_config
from ditc.runtime.errors import CheckpointError, UsageError

FETCH = "transformer/config.json is damaged or was edited, or the model is not an SD3: fetch it again"
QK_NORM = "rms_norm"

# Blocks whose activations exceed fp16's range, by the network's numbers of blocks and heads: block 35 of SD3.5-large
# and its turbo. Source: NVIDIA/TensorRT, demo/Diffusion, which runs that block in fp32.
FP32_BLOCKS: dict[tuple[int, int], tuple[int, ...]] = {(38, 38): (35,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3Config:
    """The transformer's settings. Names and defaults are those of diffusers 0.42.1's SD3Transformer2DModel.

    Attributes:
        dual_attention_layers: blocks whose image stream has a second self-attention (MMDiT-X).
        pos_embed_max_size: side of the stored position embedding in patches; a picture uses its centre.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @property
    def width(self) -> int:
        """Channels of a token, the same in both streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def largest_side(self) -> int:
        """Side in latent cells of the largest picture that the position embedding covers."""
        return self.pos_embed_max_size * self.patch_size

    @property
    def fp32_blocks(self) -> tuple[int, ...]:
        """Blocks that stay in fp32 in an fp16 network."""
        return FP32_BLOCKS.get((self.num_layers, self.num_attention_heads), ())

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, has_text: bool = True) -> Sd3Config:
        """Parse transformer/config.json.

        Args:
            has_text: whether the network reads text. The caption's settings of one that does not are not checked.

        Raises:
            CheckpointError: a setting is unknown, or the network here does not implement it.
        """
        values = {**values}
        values["out_channels"] = values.get("out_channels", 16) or values.get("in_channels", 16)
        config = read_config(cls, values, ignored=(), may_be_zero=("dual_attention_layers",))
        if config.out_channels != config.in_channels:
            raise CheckpointError(
                f"out_channels is {config.out_channels}, but must be {config.in_channels} like in_channels",
                hint=FETCH,
            )
        if config.qk_norm not in (None, QK_NORM):
            raise CheckpointError(
                f"qk_norm is {config.qk_norm!r}, but only None and {QK_NORM!r} are implemented",
                hint=FETCH,
            )
        if has_text and config.caption_projection_dim != config.width:
            raise CheckpointError(
                f"caption_projection_dim is {config.caption_projection_dim}, but must be {config.width}: both streams "
                f"have {config.num_attention_heads} heads of {config.attention_head_dim} channels",
                hint=FETCH,
            )
        return config

    def check_size(self, height: int, width: int) -> None:
        """Refuse latents that the position embedding does not cover.

        Args:
            height, width: in latent cells.

        Raises:
            UsageError: a side is too large, or is not a whole number of patches.
        """
        for name, side in (("height", height), ("width", width)):
            if side > self.largest_side:
                raise UsageError(
                    f"latent {name} {side} is larger than the position embedding, which covers {self.largest_side} "
                    f"({self.pos_embed_max_size} patches of {self.patch_size})",
                    hint=f"use at most {self.largest_side} latent cells per side; a cell is 8 pixels wide",
                )
            if side % self.patch_size:
                raise UsageError(
                    f"latent {name} {side} is not a multiple of the patch size {self.patch_size}",
                    hint=f"ask for a multiple of {8 * self.patch_size} pixels",
                )

    def check_skip_layers(self, skip_layers: tuple[int, ...]) -> None:
        """Refuse blocks that skip-layer guidance cannot skip. Raises UsageError."""
        foreign = [index for index in skip_layers if not 0 <= index < self.num_layers]
        if foreign:
            raise UsageError(
                f"skip layers {foreign} are not blocks of this network, which has {self.num_layers}",
                hint="for SD3.5-medium they are 7, 8 and 9",
            )
