"""AutoencoderKL, the autoencoder of SD3 and its relatives (arXiv 2112.10752), as export-grade decoder and encoder.

The reference is diffusers 0.42.1's AutoencoderKL. The networks apply the latents' scale and shift themselves, so a
pipeline does no arithmetic on latents. The encoder returns mean and standard deviation of the posterior, from which
diffusers' image-to-image draws a sample.

These stay fp32 in 16-bit networks: group norms and softmax.
"""

# B batch, C channels, H/W picture, h/w latents

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.networks.autoencoder_kl_blocks import DownBlock, GroupNorm, MidBlock, UpBlock
from ditc.export.networks.autoencoder_kl_config import AutoencoderKlConfig as AutoencoderKlConfig
from ditc.export.networks.loading import build_empty, check_layers, load_strict


def load_kl_decoder(
    config: AutoencoderKlConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> KlVaeDecoder:
    """Load the decoder with the weights of a diffusers vae/ directory.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    return _load_both(config, tensors, dtype, unread="vae_encoder")[0]


def load_kl_encoder(
    config: AutoencoderKlConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> KlVaeEncoder:
    """Load the encoder with the weights of a diffusers vae/ directory.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    return _load_both(config, tensors, dtype, unread="vae_decoder")[1]


def _load_both(
    config: AutoencoderKlConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, unread: str
) -> tuple[KlVaeDecoder, KlVaeEncoder]:
    check_layers("layers_per_block", config.layers_per_block, tensors, "encoder.down_blocks.0.resnets")
    decoder, encoder = build_empty(lambda: KlVaeDecoder(config)), build_empty(lambda: KlVaeEncoder(config))
    load_strict({"vae_decoder": decoder, "vae_encoder": encoder}, tensors, dtype, unread=(unread,))
    return decoder, encoder


class KlVaeDecoder(nn.Module):
    """Decodes latents, as the denoiser sees them, to a picture."""

    weights_below = ""

    def __init__(self, config: AutoencoderKlConfig) -> None:
        super().__init__()
        self.scaling_factor, self.shift_factor = config.scaling_factor, config.shift_factor or 0.0
        latent = config.latent_channels
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else nn.Identity()
        self.decoder = Decoder(config)

    def forward(self, latents: Tensor) -> Tensor:
        """(B,C,h,w) fp32 -> (B,3,H,W) fp32, nominally in [-1,1], not clamped."""
        unscaled = latents / self.scaling_factor + self.shift_factor
        image: Tensor = self.decoder(self.post_quant_conv(unscaled.to(self.decoder.conv_in.weight.dtype)))
        return image.float()


class KlVaeEncoder(nn.Module):
    """Encodes a picture to the posterior of its latents, as the denoiser sees them."""

    weights_below = ""

    def __init__(self, config: AutoencoderKlConfig) -> None:
        super().__init__()
        self.scaling_factor, self.shift_factor = config.scaling_factor, config.shift_factor or 0.0
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else nn.Identity()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B,3,H,W) fp32 in [-1,1] -> mean and standard deviation, (B,C,h,w) fp32 each.

        The bounds of the logarithm are those of diffusers' DiagonalGaussianDistribution.
        """
        moments = self.quant_conv(self.encoder(image.to(self.encoder.conv_in.weight.dtype)))
        mean, log_variance = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * torch.clamp(log_variance, -30.0, 20.0))
        return (mean - self.shift_factor) * self.scaling_factor, std * self.scaling_factor


class Decoder(nn.Module):
    """diffusers' Decoder: a convolution, the middle block, stages from small to large, norm, SiLU, a convolution."""

    def __init__(self, config: AutoencoderKlConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, width, groups, config.layers_per_block + 1, up=i < len(widths) - 1)
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x_BCHW))
        for stage in self.up_blocks:
            x = stage(x)
        image: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return image


class Encoder(nn.Module):
    """diffusers' Encoder: stages from large to small, then the middle block. It returns mean and log variance."""

    def __init__(self, config: AutoencoderKlConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, width, groups, config.layers_per_block, down=i < len(widths) - 1)
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.conv_in(x_BCHW)
        for stage in self.down_blocks:
            x = stage(x)
        moments: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return moments
