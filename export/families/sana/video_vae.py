"""The autoencoders that SANA-Video's releases come with: Wan 2.1's for 480p, and LTX-2's for 720p."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ditc.export.checkpoint.open import Component
from ditc.export.families.common.specs import STAGE_DTYPES, TORCH_DTYPES, companion_precision
from ditc.export.families.common.video_vae import (
    FirstChunkDecoder,
    FirstFrameEncoder,
    NextChunkDecoder,
    video_vae_specs,
    whole_video_vae_specs,
)
from ditc.export.networks.ltx2_vae import load_ltx2_decoder, load_ltx2_encoder
from ditc.export.networks.ltx2_vae_config import Ltx2VaeConfig
from ditc.export.networks.wan_vae import WanVaeDecoder, kept_frames, load_wan_decoder, load_wan_encoder
from ditc.export.networks.wan_vae_config import WanVaeConfig
from ditc.export.options import BuildOptions
from ditc.runtime.bundle.manifest import LatentSpec, Tiling
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import VAE_DECODER, VAE_ENCODER, Precision, Range, StageSpec

LTX2 = "AutoencoderKLLTX2Video"
VideoVae = WanVaeConfig | Ltx2VaeConfig


def read_vae(component: Component) -> VideoVae:
    """The autoencoder's settings.

    Raises:
        CheckpointError: a setting is unknown, or the networks here do not implement it.
    """
    if component.class_name == LTX2:
        return component.read_config(Ltx2VaeConfig.from_json)
    return component.read_config(WanVaeConfig.from_json)


def latent_channels(vae: VideoVae) -> int:
    """The number of latent channels."""
    return vae.latent_channels if isinstance(vae, Ltx2VaeConfig) else vae.z_dim


def vae_stages(
    vae: VideoVae,
    latents: LatentSpec,
    sizes: Mapping[str, Range],
    tiling: Tiling | None,
    options: BuildOptions,
) -> dict[str, StageSpec]:
    """Specs of the autoencoder's stages. LTX-2's decoder takes a whole video, Wan's one latent frame at a time.

    Raises:
        UsageError: tiles are asked for, and the decoder takes whole videos.
    """
    if isinstance(vae, Ltx2VaeConfig):
        if tiling is not None:
            raise UsageError(
                f"tiling is {tiling.tile} and {tiling.stride} pixels, but {LTX2} decodes a video as a whole",
                hint='leave "tiling" out of ditc.json',
            )
        return whole_video_vae_specs(latents, sizes, smallest=vae.fewest_cells, max_batch=options.max_batch)
    dtype = STAGE_DTYPES[companion_precision(options)]
    kept = kept_frames(vae, WanVaeDecoder)
    return video_vae_specs(latents, sizes, kept, dtype=dtype, max_batch=options.max_batch, tiling=tiling)


def load_vae(component: Component, stage: str, precision: Precision) -> nn.Module:
    """Load a stage of the autoencoder with its weights.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    vae, tensors, dtype = read_vae(component), component.tensors, TORCH_DTYPES[precision]
    if isinstance(vae, Ltx2VaeConfig):
        if stage == VAE_ENCODER:
            return FirstFrameEncoder(load_ltx2_encoder(vae, tensors, dtype))
        return load_ltx2_decoder(vae, tensors, dtype)
    if stage == VAE_ENCODER:
        return FirstFrameEncoder(load_wan_encoder(vae, tensors, dtype))
    decoder = load_wan_decoder(vae, tensors, dtype)
    return FirstChunkDecoder(decoder) if stage == VAE_DECODER else NextChunkDecoder(decoder)
