"""AutoencoderKLWan, the video autoencoder of Wan 2.1 (arXiv 2503.20314), as export-grade streaming networks.

A video is decoded and encoded in chunks, as diffusers 0.42.1's AutoencoderKLWan does. Diffusers hides what convolutions
keep from chunk to chunk in the module; here it is an input and an output, so each chunk is one run of a graph, and
memory does not grow with the video's length. The first chunk is one frame, on both sides. It takes no kept frames and
has no resampling in time, so a network gives two graphs:

    first chunk    one latent frame  <-> one frame
    next chunks    n latent frames   <-> n * frames_per_latent frames, for any n

The networks apply the latents' statistics themselves, so a pipeline does no arithmetic on latents. Norms and softmax
stay fp32 in 16-bit networks.
"""

# B batch, C latent channels, t latent frames, T frames, H/W picture, h/w latents

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.networks.loading import build_empty, check_layers, load_strict
from ditc.export.networks.wan_vae_blocks import (
    CausalConv3d,
    ChannelNorm,
    Downsample,
    MidBlock,
    ResidualBlock,
    Stream,
    Upsample,
)
from ditc.export.networks.wan_vae_config import WanVaeConfig as WanVaeConfig


def load_wan_decoder(
    config: WanVaeConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> WanVaeDecoder:
    """Load the decoder with the weights of a diffusers vae/ directory.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    return _load_both(config, tensors, dtype, unread="vae_encoder")[0]


def load_wan_encoder(
    config: WanVaeConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> WanVaeEncoder:
    """Load the encoder with the weights of a diffusers vae/ directory.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    return _load_both(config, tensors, dtype, unread="vae_decoder")[1]


def _load_both(
    config: WanVaeConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, unread: str
) -> tuple[WanVaeDecoder, WanVaeEncoder]:
    check_layers("num_res_blocks", config.num_res_blocks + 1, tensors, "decoder.up_blocks.0.resnets")
    decoder, encoder = build_empty(lambda: WanVaeDecoder(config)), build_empty(lambda: WanVaeEncoder(config))
    load_strict({"vae_decoder": decoder, "vae_encoder": encoder}, tensors, dtype, unread=(unread,))
    return decoder, encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptFrames:
    """What one convolution keeps between chunks: a tensor (B,channels,frames,h*scale,w*scale) in the network's type."""

    channels: int
    frames: int
    scale: int


class WanVaeDecoder(nn.Module):
    """Decodes a chunk of latent frames, as the denoiser sees them, to frames."""

    weights_below = ""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        self.statistics = Statistics(config)
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def forward(self, latents: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """Decode one chunk.

        Args:
            latents: (B,C,t,h,w) fp32. t is 1 in the first chunk.
            kept: what the last chunk returned after its frames, as kept_frames says; nothing for the first chunk.

        Returns:
            frames (B,3,T,H,W) fp32, nominally in [-1,1], not clamped; then what the next chunk needs.
        """
        stream = Stream(kept or None)
        unscaled = self.statistics.unscaled(latents).to(self.post_quant_conv.weight.dtype)
        frames = self.decoder(self.post_quant_conv(unscaled), stream)
        return frames.float(), *stream.left


class WanVaeEncoder(nn.Module):
    """Encodes a chunk of frames to the means of its latents, as the denoiser sees them."""

    weights_below = ""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        self.statistics = Statistics(config)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)

    def forward(self, frames: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """Encode one chunk.

        Args:
            frames: (B,3,T,H,W) fp32 in [-1,1]. T is 1 in the first chunk, and else a multiple of frames_per_latent.
            kept: what the last chunk returned after its latents; nothing for the first chunk.

        Returns:
            latents (B,C,t,h,w) fp32, the mode of the posterior; then what the next chunk needs.
        """
        stream = Stream(kept or None)
        moments = self.quant_conv(self.encoder(frames.to(self.quant_conv.weight.dtype), stream))
        mean, _ = moments.float().chunk(2, dim=1)  # the rest is the logarithm of the variance
        return self.statistics.scaled(mean), *stream.left


def kept_frames(config: WanVaeConfig, network: type[WanVaeDecoder] | type[WanVaeEncoder]) -> list[KeptFrames]:
    """What the network takes and returns between chunks, in order. A run without values finds the shapes."""
    cells = 8
    channels, side = config.z_dim, cells
    if network is WanVaeEncoder:
        channels, side = config.in_channels, cells * config.pixels_per_latent
    with torch.device("meta"), torch.no_grad():
        _, *left = network(config)(torch.empty(1, channels, 1, side, side))
    return [KeptFrames(channels=x.shape[1], frames=x.shape[2], scale=x.shape[3] // cells) for x in left]


class Statistics(nn.Module):
    """Mean and standard deviation of each latent channel. The denoiser sees (latents - mean) / std."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        # Plain tensors, which are not in the checkpoint's weights and stay fp32.
        mean, std = config.latents_mean, config.latents_std
        self.mean, self.std = (torch.tensor(x, device="cpu")[:, None, None, None] for x in (mean, std))

    def scaled(self, latents: Tensor) -> Tensor:
        """As the denoiser sees them."""
        return (latents - self.mean.to(latents.device)) / self.std.to(latents.device)

    def unscaled(self, latents: Tensor) -> Tensor:
        """As the autoencoder sees them."""
        return latents * self.std.to(latents.device) + self.mean.to(latents.device)


class Decoder(nn.Module):
    """diffusers' WanDecoder3d: a convolution, the middle block, stages from small to large, the last convolution."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * factor for factor in reversed(config.dim_mult)]
        self.conv_in = CausalConv3d(config.z_dim, widths[0])
        self.mid_block = MidBlock(widths[0])
        befores = [widths[0], *(width // 2 for width in widths[:-1])]  # an upsampling halves the channels
        in_time = [*reversed(config.temperal_downsample), None]  # the last stage does not upsample
        self.up_blocks = nn.ModuleList(
            UpBlock(before, width, config.num_res_blocks + 1, frames)
            for before, width, frames in zip(befores, widths, in_time, strict=True)
        )
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        x = self.mid_block(self.conv_in(x_BCTHW, stream), stream)
        for stage in self.up_blocks:
            x = stage(x, stream)
        frames: Tensor = self.conv_out(F.silu(self.norm_out(x)), stream)
        return frames


class UpBlock(nn.Module):
    """Residual blocks, then upsampling.

    Args:
        frames: whether frames are upsampled too; None: neither frames nor pictures are.
    """

    def __init__(self, before: int, width: int, depth: int, frames: bool | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(before if i == 0 else width, width) for i in range(depth))
        self.upsamplers = nn.ModuleList([] if frames is None else [Upsample(width, frames=frames)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, stream)
        return x


class Encoder(nn.Module):
    """diffusers' WanEncoder3d: stages from large to small in one list, then the middle block."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in config.dim_mult]
        self.conv_in = CausalConv3d(config.in_channels, config.base_dim)
        blocks: list[nn.Module] = []
        for index, (before, width) in enumerate(zip([config.base_dim, *widths], widths, strict=False)):
            blocks += [
                ResidualBlock(before if i == 0 else width, width) for i in range(config.num_res_blocks)
            ]
            if index < len(widths) - 1:
                blocks.append(Downsample(width, frames=config.temperal_downsample[index]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim)

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x_BCTHW, stream)
        for block in self.down_blocks:
            x = block(x, stream)
        moments: Tensor = self.conv_out(F.silu(self.norm_out(self.mid_block(x, stream))), stream)
        return moments
