"""The settings of an AutoencoderKLWan, as diffusers' vae/config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditc.export.networks.config import MAX_STAGES, read_config
from ditc.runtime.errors import CheckpointError

FETCH = "vae/config.json is damaged or was edited, or is of another VAE: fetch it again"
# Settings of which the networks here implement one value only: Wan 2.1's. Wan 2.2 has the other ones.
FIXED: dict[str, Any] = {"attn_scales": (), "is_residual": False, "patch_size": None}
# The statistics of Wan 2.1's latents, per channel.
MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WanVaeConfig:
    """The autoencoder's settings. Names and defaults are those of diffusers 0.42.1's AutoencoderKLWan.

    Attributes:
        dim_mult: width of each stage, in multiples of base_dim; index 0 is the stage with the largest picture.
        temperal_downsample: for all stages but the last, whether it halves the frames too. (The name is upstream's.)
        latents_mean, latents_std: the denoiser sees (latents - latents_mean) / latents_std.
        scale_factor_temporal, scale_factor_spatial: what the stages amount to.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = MEAN
    latents_std: tuple[float, ...] = STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int | None = 4
    scale_factor_spatial: int | None = 8

    @property
    def frames_per_latent(self) -> int:
        """Frames that a latent frame stands for, except the first one, which stands for one."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def pixels_per_latent(self) -> int:
        """Side in pixels of a latent cell."""
        return 2 ** (len(self.dim_mult) - 1)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WanVaeConfig:
        """Parse vae/config.json.

        Raises:
            CheckpointError: a setting is unknown, or the networks here do not implement it.
        """
        config = read_config(cls, values, ignored=("dropout",))
        for name, value in FIXED.items():
            if getattr(config, name) != value:
                raise CheckpointError(
                    f"{name} is {getattr(config, name)!r} in the WanVae config.json, but only {value!r} is "
                    "implemented",
                    hint="use a model with the autoencoder of Wan 2.1",
                )
        _check(config)
        return config


def _check(config: WanVaeConfig) -> None:
    stages = len(config.dim_mult)
    for wrong, what in (
        (
            not 1 < stages <= MAX_STAGES,
            f"dim_mult has {stages} entries, and 2 to {MAX_STAGES} are possible",
        ),
        (
            len(config.temperal_downsample) != stages - 1,
            f"temperal_downsample has {len(config.temperal_downsample)} entries, but all stages but one of "
            f"dim_mult, {stages - 1}, need one",
        ),
        (
            {len(config.latents_mean), len(config.latents_std)} != {config.z_dim},
            f"latents_mean and latents_std have {len(config.latents_mean)} and {len(config.latents_std)} entries, "
            f"but z_dim is {config.z_dim}",
        ),
        (0.0 in config.latents_std, "latents_std has a 0, and latents are divided by it"),
        (
            (config.in_channels, config.out_channels) != (3, 3),
            f"in_channels and out_channels are {config.in_channels} and {config.out_channels}, and a picture has 3",
        ),
        (
            (config.scale_factor_temporal, config.scale_factor_spatial)
            != (config.frames_per_latent, config.pixels_per_latent),
            f"scale_factor_temporal and scale_factor_spatial are {config.scale_factor_temporal} and "
            f"{config.scale_factor_spatial}, but the stages give {config.frames_per_latent} and "
            f"{config.pixels_per_latent}",
        ),
    ):
        if wrong:
            raise CheckpointError(f"the WanVae config.json cannot be used: {what}", hint=FETCH)
