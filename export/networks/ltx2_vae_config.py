"""The settings of an AutoencoderKLLTX2Video, as diffusers' vae/config.json has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditc.export.networks.config import MAX_STAGES, read_config
from ditc.runtime.errors import CheckpointError

FETCH = "vae/config.json is damaged or was edited, or is of another VAE: fetch it again"
BLOCK = "LTX2VideoDownBlock3D"
# By the name of a resampling: whether it halves the frames, and the sides.
RESAMPLINGS = {"spatial": (1, 2), "temporal": (2, 1), "spatiotemporal": (2, 2)}
PADDINGS = ("zeros", "reflect")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ltx2VaeConfig:
    """The autoencoder's settings. Names and defaults are those of diffusers 0.42.1's AutoencoderKLLTX2Video.

    Attributes:
        block_out_channels, decoder_block_out_channels: width of each stage; index 0 is the one with the largest frames.
        layers_per_block, decoder_layers_per_block: residual blocks of each stage, and last of the middle.
        downsample_type, upsample_type: what each stage resamples: "spatial", "temporal" or "spatiotemporal".
        upsample_factor: by how much an upsampling divides the channels, beside what goes into frames and pixels.
        encoder_causal, decoder_causal: whether a frame depends on earlier frames alone.
        spatial_compression_ratio, temporal_compression_ratio: what patches and stages amount to.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    block_out_channels: tuple[int, ...] = (256, 512, 1024, 2048)
    down_block_types: tuple[str, ...] = (BLOCK,) * 4
    decoder_block_out_channels: tuple[int, ...] = (256, 512, 1024)
    layers_per_block: tuple[int, ...] = (4, 6, 6, 2, 2)
    decoder_layers_per_block: tuple[int, ...] = (5, 5, 5, 5)
    spatio_temporal_scaling: bool | tuple[bool, ...] = (True, True, True, True)
    decoder_spatio_temporal_scaling: bool | tuple[bool, ...] = (True, True, True)
    decoder_inject_noise: bool | tuple[bool, ...] = (False, False, False, False)
    downsample_type: tuple[str, ...] = ("spatial", "temporal", "spatiotemporal", "spatiotemporal")
    upsample_type: tuple[str, ...] = ("spatiotemporal", "spatiotemporal", "spatiotemporal")
    upsample_residual: bool | tuple[bool, ...] = (True, True, True)
    upsample_factor: tuple[int, ...] = (2, 2, 2)
    timestep_conditioning: bool = False
    patch_size: int = 4
    patch_size_t: int = 1
    encoder_causal: bool = True
    decoder_causal: bool = True
    encoder_spatial_padding_mode: str = "zeros"
    decoder_spatial_padding_mode: str = "reflect"
    spatial_compression_ratio: int | None = None
    temporal_compression_ratio: int | None = None

    @property
    def frames_per_latent(self) -> int:
        """Frames that a latent frame stands for, except the first one, which stands for one."""
        return math.prod(RESAMPLINGS[kind][0] for kind in self.upsample_type)

    @property
    def pixels_per_latent(self) -> int:
        """Side in pixels of a latent cell."""
        return self.patch_size * math.prod(RESAMPLINGS[kind][1] for kind in self.upsample_type)

    @property
    def fewest_cells(self) -> int:
        """The smallest side of the latents: a row that is mirrored without its edge needs another one beside it."""
        return 2 if self.decoder_spatial_padding_mode == "reflect" else 1

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Ltx2VaeConfig:
        """Parse vae/config.json.

        Raises:
            CheckpointError: a setting is unknown, or the networks here do not implement it.
        """
        # scaling_factor is 1 and unread in SanaVideoPipeline, and the norms of diffusers' class ignore resnet_norm_eps.
        config = read_config(cls, values, ignored=("scaling_factor", "resnet_norm_eps"))
        for wrong, what in _problems(config):
            if wrong:
                raise CheckpointError(f"the Ltx2Vae config.json cannot be used: {what}", hint=FETCH)
        return config


def _problems(config: Ltx2VaeConfig) -> list[tuple[bool, str]]:
    down, up = len(config.block_out_channels), len(config.decoder_block_out_channels)
    kinds = (*config.downsample_type, *config.upsample_type)
    if unknown := set(kinds) - RESAMPLINGS.keys():
        return [
            (True, f"it resamples {sorted(unknown)}, and {', '.join(RESAMPLINGS)} are implemented"),
        ]
    frames, side = config.frames_per_latent, config.pixels_per_latent
    encoder = tuple(math.prod(RESAMPLINGS[kind][axis] for kind in config.downsample_type) for axis in (0, 1))
    return [
        (not (1 <= down <= MAX_STAGES and 1 <= up <= MAX_STAGES), f"it has {down} and {up} stages"),
        (
            (len(config.layers_per_block), len(config.decoder_layers_per_block)) != (down + 1, up + 1),
            "layers_per_block and decoder_layers_per_block need an entry for each stage, and one for the middle",
        ),
        (
            (len(config.downsample_type), len(config.upsample_type), len(config.upsample_factor))
            != (down, up, up),
            "downsample_type, upsample_type and upsample_factor need an entry for each stage",
        ),
        (set(config.down_block_types) != {BLOCK}, f"down_block_types has others than {BLOCK}"),
        (not _all(config.spatio_temporal_scaling, True), "spatio_temporal_scaling is false somewhere"),
        (
            not _all(config.decoder_spatio_temporal_scaling, True),
            "decoder_spatio_temporal_scaling is false somewhere",
        ),
        (
            not _all(config.decoder_inject_noise, False),
            "decoder_inject_noise is true: frames would be random",
        ),
        (not _all(config.upsample_residual, True), "upsample_residual is false somewhere"),
        (
            config.timestep_conditioning,
            "timestep_conditioning is true, and the decoder here takes no timestep",
        ),
        (config.patch_size_t != 1, f"patch_size_t is {config.patch_size_t}, and 1 is implemented"),
        (
            not {config.encoder_spatial_padding_mode, config.decoder_spatial_padding_mode} <= set(PADDINGS),
            f"the padding modes are others than {' and '.join(PADDINGS)}",
        ),
        (
            (config.in_channels, config.out_channels) != (3, 3),
            f"in_channels and out_channels are {config.in_channels} and {config.out_channels}, and a picture has 3",
        ),
        (
            not _fit(config),
            "the widths of its stages do not fit what they resample, or would need shortcuts",
        ),
        (
            encoder != (frames, side // config.patch_size),
            "downsample_type and upsample_type amount to different numbers of frames or pixels",
        ),
        (
            (config.temporal_compression_ratio, config.spatial_compression_ratio) != (frames, side),
            f"temporal_compression_ratio and spatial_compression_ratio are {config.temporal_compression_ratio} and "
            f"{config.spatial_compression_ratio}, but the stages give {frames} and {side}",
        ),
    ]


def _fit(config: Ltx2VaeConfig) -> bool:
    """Whether every stage takes the channels that the one before gives, in whole numbers."""
    before, fits = config.latent_channels, True
    for width, kind in zip(config.block_out_channels, config.downsample_type, strict=False):
        parts = _parts(kind)
        fits = fits and width % parts == 0 and before * parts % width == 0
        before = width
    before = config.decoder_block_out_channels[-1]
    widths, factors = config.decoder_block_out_channels[::-1], config.upsample_factor[::-1]
    for width, kind, factor in zip(
        widths, config.upsample_type, factors, strict=False
    ):  # as diffusers orders them
        fits = (
            fits and width == before and width % _parts(kind) == _parts(kind) % factor == width % factor == 0
        )
        before = width // factor
    return fits


def _parts(kind: str) -> int:
    """How many cells of the larger side one of the smaller side stands for."""
    frames, side = RESAMPLINGS[kind]
    return frames * side * side


def _all(values: bool | tuple[bool, ...], wanted: bool) -> bool:
    return set(values if isinstance(values, tuple) else (values,)) <= {wanted}
