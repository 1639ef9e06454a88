"""DC-AE, the deep-compression autoencoder (arXiv 2410.10733), as export-grade decoder and encoder.

The reference is diffusers 0.42.1's AutoencoderDC. Two things differ in form but not in value: the attention is always
the linear form (diffusers uses the N x N form for small pictures, which is the same function), and norms of pictures
need no transposes. The networks apply the latents' scale themselves, so a pipeline does no arithmetic on latents.
"""

# B batch, C channels, H/W picture, h/w latents, N = H*W tokens, K heads over all scales, D head dim

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ditc.export.networks.dc_ae_blocks import (
    ACTIVATIONS,
    Downsample,
    Upsample,
    average_channels,
    make_block,
    repeat_channels,
)
from ditc.export.networks.dc_ae_config import DcAeConfig as DcAeConfig
from ditc.export.networks.layers import RMSNorm
from ditc.export.networks.loading import Without, build_empty, check_layers, load_strict

OUT_NORM_EPS = 1e-5
TRAINING_COUNT = ".num_batches_tracked"  # of a batch norm: how many batches it was trained with


def load_decoder(config: DcAeConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> VaeDecoder:
    """Load the decoder with the weights of a diffusers vae/ directory.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    return _load_both(config, tensors, dtype, unread="vae_encoder")[0]


def load_encoder(config: DcAeConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> VaeEncoder:
    """Load the encoder with the weights of a diffusers vae/ directory.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    return _load_both(config, tensors, dtype, unread="vae_decoder")[1]


def _load_both(
    config: DcAeConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, unread: str
) -> tuple[VaeDecoder, VaeEncoder]:
    for side, stages in (("decoder", "decoder.up_blocks"), ("encoder", "encoder.down_blocks")):
        for i, layers in enumerate(getattr(config, f"{side}_layers_per_block")):
            check_layers(f"{side}_layers_per_block[{i}]", layers, tensors, f"{stages}.{i}")
    decoder, encoder = build_empty(lambda: VaeDecoder(config)), build_empty(lambda: VaeEncoder(config))
    counts = [name for name in tensors if name.endswith(TRAINING_COUNT)]
    read = Without(tensors, *counts)
    load_strict({"vae_decoder": decoder, "vae_encoder": encoder}, read, dtype, unread=(unread,))
    return decoder, encoder


class VaeDecoder(nn.Module):
    """Decodes latents, as the denoiser sees them, to a picture."""

    weights_below = ""

    def __init__(self, config: DcAeConfig) -> None:
        super().__init__()
        self.scaling_factor = config.scaling_factor
        self.decoder = DcAeDecoder(config)

    def forward(self, latents: Tensor) -> Tensor:
        """(B,C,h,w) fp32 -> (B,3,H,W) fp32, nominally in [-1,1], not clamped."""
        dtype = self.decoder.conv_in.weight.dtype
        image: Tensor = self.decoder((latents / self.scaling_factor).to(dtype))
        return image.float()


class VaeEncoder(nn.Module):
    """Encodes a picture to latents as the denoiser sees them."""

    weights_below = ""

    def __init__(self, config: DcAeConfig) -> None:
        super().__init__()
        self.scaling_factor = config.scaling_factor
        self.encoder = DcAeEncoder(config)

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,H,W) fp32 in [-1,1] -> (B,C,h,w) fp32."""
        latents: Tensor = self.encoder(image.to(self.encoder.conv_out.weight.dtype))
        return latents.float() * self.scaling_factor


class DcAeDecoder(nn.Module):
    """diffusers' Decoder: a convolution, stages from small to large, norm, activation, a convolution or upsampling.

    The first convolution may have a shortcut of repeated channels.
    """

    def __init__(self, config: DcAeConfig) -> None:
        super().__init__()
        channels, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
        last = len(channels) - 1
        self.shortcut_repeats = channels[-1] // config.latent_channels if config.decoder_in_shortcut else 0
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        stages = []
        for i, (width, depth) in enumerate(zip(channels, layers, strict=True)):
            blocks: list[nn.Module] = []
            if i < last and depth > 0:
                blocks.append(Upsample(channels[i + 1], width, config.upsample_block_type))
            blocks += [
                make_block(
                    config.decoder_block_types[i],
                    width,
                    head_dim=config.attention_head_dim,
                    norm=config.decoder_norm_types[i],
                    activation=config.decoder_act_fns[i],
                    scales=config.decoder_qkv_multiscales[i],
                )
                for _ in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
        self.up_blocks = nn.ModuleList(stages)
        outer = channels[0] if layers[0] > 0 else channels[1]
        self.norm_out = RMSNorm(outer, OUT_NORM_EPS, bias=True, dim_of_channels=1)
        self.conv_act = ACTIVATIONS[config.decoder_conv_act_fn]()
        self.conv_out: nn.Module = (
            nn.Conv2d(outer, config.in_channels, 3, padding=1)
            if layers[0] > 0
            else Upsample(outer, config.in_channels, config.upsample_block_type, shortcut=False)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner = self.conv_in(x_BCHW)
        if self.shortcut_repeats:
            inner = inner + repeat_channels(x_BCHW, self.shortcut_repeats)
        for stage in reversed(self.up_blocks):
            inner = stage(inner)
        image: Tensor = self.conv_out(self.conv_act(self.norm_out(inner)))
        return image


class DcAeEncoder(nn.Module):
    """diffusers' Encoder: the mirror image of the decoder, always with RMSNorm and SiLU."""

    def __init__(self, config: DcAeConfig) -> None:
        super().__init__()
        channels, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
        last = len(channels) - 1
        self.shortcut_group = channels[-1] // config.latent_channels if config.encoder_out_shortcut else 0
        self.conv_in: nn.Module = (
            nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
            if layers[0] > 0
            else Downsample(config.in_channels, channels[1], config.downsample_block_type, shortcut=False)
        )
        stages = []
        for i, (width, depth) in enumerate(zip(channels, layers, strict=True)):
            blocks: list[nn.Module] = [
                make_block(
                    config.encoder_block_types[i],
                    width,
                    head_dim=config.attention_head_dim,
                    norm="rms_norm",
                    activation="silu",
                    scales=config.encoder_qkv_multiscales[i],
                )
                for _ in range(depth)
            ]
            if i < last and depth > 0:
                blocks.append(Downsample(width, channels[i + 1], config.downsample_block_type))
            stages.append(nn.Sequential(*blocks))
        self.down_blocks = nn.ModuleList(stages)
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner = self.conv_in(x_BCHW)
        for stage in self.down_blocks:
            inner = stage(inner)
        latents: Tensor = self.conv_out(inner)
        if self.shortcut_group:
            latents = latents + average_channels(inner, self.shortcut_group)
        return latents
