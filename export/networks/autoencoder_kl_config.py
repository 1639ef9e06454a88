"""The settings of an AutoencoderKL, as diffusers' vae/config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditc.export.networks.config import MAX_STAGES, read_config
from ditc.runtime.errors import CheckpointError

FETCH = "vae/config.json is damaged or was edited, or is of another VAE: fetch it again"
# Settings of which the networks here implement one value only.
FIXED: dict[str, Any] = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
DEFAULT_CHANNELS = (64,)
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderKlConfig:
    """The autoencoder's settings. Names and defaults are those of diffusers 0.42.1's AutoencoderKL.

    Attributes:
        block_out_channels: one value per stage; index 0 is the stage with the largest picture.
        scaling_factor, shift_factor: the denoiser sees (latents - shift_factor) * scaling_factor. SD3 has 1.5305 and
            0.0609.
        sample_size: side in pixels of the pictures that it was trained with; also the side of a tile.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = DEFAULT_CHANNELS
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def scale_factor(self) -> int:
        """Side of one latent cell in pixels."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AutoencoderKlConfig:
        """Parse vae/config.json.

        Raises:
            CheckpointError: a setting is unknown, or the networks here do not implement it.
        """
        # force_upcast is ignored, because the build chooses the precision.
        config = read_config(cls, values, ignored=(*FIXED, *BLOCKS, "force_upcast"))
        for name, implemented in FIXED.items():
            if values.get(name, implemented) != implemented:
                raise CheckpointError(
                    f"{name} is {values[name]!r}; only {implemented!r} is implemented", hint=FETCH
                )
        stages = len(config.block_out_channels)
        for name, block in BLOCKS.items():
            kinds = values.get(name, (block,))
            if not isinstance(kinds, list | tuple) or any(kind != block for kind in kinds):
                raise CheckpointError(f"{name} is {kinds!r}, but only {block} is implemented", hint=FETCH)
            if len(kinds) != stages:
                raise CheckpointError(
                    f"{name} has {len(kinds)} entries, but block_out_channels has {stages}", hint=FETCH
                )
        _check_sizes(config)
        return config


def _check_sizes(config: AutoencoderKlConfig) -> None:
    groups = config.norm_num_groups
    for wrong, what in (
        (
            any(width % groups for width in config.block_out_channels),
            f"norm_num_groups {groups} does not divide block_out_channels {config.block_out_channels}",
        ),
        (
            (config.in_channels, config.out_channels) != (3, 3),
            f"in_channels and out_channels are {config.in_channels} and {config.out_channels}, and a picture has 3",
        ),
        (
            len(config.block_out_channels) > MAX_STAGES,
            f"block_out_channels has {len(config.block_out_channels)} entries, and {MAX_STAGES} are the most",
        ),
        (not config.block_out_channels, "block_out_channels is empty"),
        (config.scaling_factor == 0, "scaling_factor is 0, and latents are divided by it"),
    ):
        if wrong:
            raise CheckpointError(f"the AutoencoderKl config.json cannot be used: {what}", hint=FETCH)
