"""AutoencoderKLLTX2Video, the video autoencoder of LTX-2, as export-grade networks.

SANA-Video's release for 720p has it. The decoder of LTX-2 is not causal: each of its convolutions over time reads a
later frame too, and there are so many of them that the first frame of a video depends on 21 later latent frames. So a
video is decoded as a whole, as diffusers 0.42.1 does it, and memory grows with its length. The encoder takes any number
of frames.

The networks apply the latents' statistics themselves, so a pipeline does no arithmetic on latents. Norms stay fp32 in
16-bit networks.
"""

# B batch, C latent channels, t latent frames, T frames, H/W picture, h/w latents

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.networks.loading import Without, build_empty, check_layers, load_strict
from ditc.export.networks.ltx2_vae_config import RESAMPLINGS
from ditc.export.networks.ltx2_vae_config import Ltx2VaeConfig as Ltx2VaeConfig
from ditc.runtime.errors import CheckpointError

# Tensors of the checkpoint that are no weights of a layer.
STATISTICS = ("latents_mean", "latents_std")
NORM_EPS = 1e-8  # of diffusers' PerChannelRMSNorm


def load_ltx2_decoder(
    config: Ltx2VaeConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Ltx2VaeDecoder:
    """Load the decoder with the weights of a diffusers vae/ directory.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    return _load_both(config, tensors, dtype, unread="vae_encoder")[0]


def load_ltx2_encoder(
    config: Ltx2VaeConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Ltx2VaeEncoder:
    """Load the encoder with the weights of a diffusers vae/ directory.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    return _load_both(config, tensors, dtype, unread="vae_decoder")[1]


def _load_both(
    config: Ltx2VaeConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, unread: str
) -> tuple[Ltx2VaeDecoder, Ltx2VaeEncoder]:
    check_layers("layers_per_block", config.layers_per_block[-1], tensors, "encoder.mid_block.resnets")
    check_layers(
        "decoder_layers_per_block", config.decoder_layers_per_block[-1], tensors, "decoder.mid_block.resnets"
    )
    mean, std = (_statistic(name, tensors, config) for name in STATISTICS)
    decoder = build_empty(lambda: Ltx2VaeDecoder(config, mean, std))
    encoder = build_empty(lambda: Ltx2VaeEncoder(config, mean, std))
    stages = {"vae_decoder": decoder, "vae_encoder": encoder}
    load_strict(stages, Without(tensors, *STATISTICS), dtype, unread=(unread,))
    return decoder, encoder


def _statistic(name: str, tensors: Mapping[str, Tensor], config: Ltx2VaeConfig) -> Tensor:
    """One number per channel, in fp32."""
    if name not in tensors:
        raise CheckpointError(
            f"the component lacks {name}", hint="config.json and the weights belong to different models"
        )
    statistic = tensors[name].float().clone()
    if tuple(statistic.shape) != (config.latent_channels,):
        raise CheckpointError(
            f"{name} has shape {tuple(statistic.shape)}, but latent_channels is {config.latent_channels}",
            hint="config.json and the weights belong to different models",
        )
    return statistic


class Ltx2VaeDecoder(nn.Module):
    """Decodes the latents of a whole video, as the denoiser sees them, to frames."""

    weights_below = ""

    def __init__(self, config: Ltx2VaeConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        # Plain tensors, which stay fp32. Both networks need them.
        self.latents_mean, self.latents_std = (x[:, None, None, None] for x in (mean, std))
        self.decoder = Decoder(config)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode a video.

        Args:
            latents: (B,C,t,h,w) fp32.

        Returns:
            frames (B,3,T,H,W) fp32, nominally in [-1,1]; T is 1 + (t-1) * frames_per_latent.
        """
        unscaled = latents * self.latents_std.to(latents.device) + self.latents_mean.to(latents.device)
        frames: Tensor = self.decoder(unscaled.to(self.decoder.conv_in.conv.weight.dtype))
        return frames.float()


class Ltx2VaeEncoder(nn.Module):
    """Encodes the frames of a video to the means of its latents, as the denoiser sees them."""

    weights_below = ""

    def __init__(self, config: Ltx2VaeConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.latents_mean, self.latents_std = (x[:, None, None, None] for x in (mean, std))
        self.encoder = Encoder(config)
        self._channels = config.latent_channels

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Encode a video.

        Args:
            frames: (B,3,T,H,W) fp32 in [-1,1]. T is 1 more than a multiple of frames_per_latent.

        Returns:
            latents (B,C,t,h,w) fp32, the mode of the posterior, alone in a tuple as those of `WanVaeEncoder` may be.
        """
        moments = self.encoder(frames.to(self.encoder.conv_in.conv.weight.dtype)).float()
        mean = moments[:, : self._channels]  # the last channel is the logarithm of the variance of all
        return ((mean - self.latents_mean.to(frames.device)) / self.latents_std.to(frames.device),)


class TimeConv3d(nn.Module):
    """A convolution over 3 frames and 3x3 pixels. Before the first frame, and after the last one, they are repeated.

    Args:
        causal: whether it reads two earlier frames; else one earlier and one later frame.
        padding: what is around a frame: "zeros", or "reflect" for its rows and columns mirrored without the edge.
    """

    def __init__(self, before: int, width: int, *, causal: bool, padding: str) -> None:
        super().__init__()
        self.causal, self.reflects = causal, padding == "reflect"
        side = 0 if self.reflects else 1
        self.conv = nn.Conv3d(before, width, 3, padding=(0, side, side))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x, first = x_BCTHW, _at(x_BCTHW, 2, 0)
        x = torch.cat([first, first, x] if self.causal else [first, x, _at(x, 2, -1)], dim=2)
        if self.reflects:
            x = torch.cat([_at(x, 3, 1), x, _at(x, 3, -2)], dim=3)
            x = torch.cat([_at(x, 4, 1), x, _at(x, 4, -2)], dim=4)
        out: Tensor = self.conv(x)
        return out


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int, *, causal: bool, padding: str) -> None:
        super().__init__()
        self.conv1 = TimeConv3d(width, width, causal=causal, padding=padding)
        self.conv2 = TimeConv3d(width, width, causal=causal, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(pixel_norm(x)))
        out: Tensor = self.conv2(F.silu(pixel_norm(inner))) + x
        return out


class Blocks(nn.Module):
    """Residual blocks of one width, in the middle of a network."""

    def __init__(self, width: int, depth: int, *, causal: bool, padding: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(width, causal=causal, padding=padding) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x


class Upsample(nn.Module):
    """Channels become frames and pixels, with a residual that is repeated to the number of channels."""

    def __init__(self, before: int, kind: str, factor: int, *, causal: bool, padding: str) -> None:
        super().__init__()
        self.frames, self.side = RESAMPLINGS[kind]
        parts = self.frames * self.side * self.side
        self.repeats = parts // factor
        self.conv = TimeConv3d(before, before * parts // factor, causal=causal, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self._spread(self.conv(x)) + self._spread(x).repeat(1, self.repeats, 1, 1, 1)

    def _spread(self, x_BCTHW: Tensor) -> Tensor:
        """(B,C*f*s*s,T,H,W) -> (B,C,T*f,H*s,W*s), without the first f-1 frames: the first frame stays one frame."""
        batch, channels, frames, height, width = x_BCTHW.shape
        parts = channels // (self.frames * self.side**2)
        x = x_BCTHW.reshape(batch, parts, self.frames, self.side, self.side, frames, height, width)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.reshape(batch, parts, frames * self.frames, height * self.side, width * self.side)
        return x[:, :, self.frames - 1 :]


class UpBlock(nn.Module):
    """Upsampling, then residual blocks."""

    def __init__(
        self, before: int, depth: int, kind: str, factor: int, *, causal: bool, padding: str
    ) -> None:
        super().__init__()
        self.upsamplers = nn.ModuleList([Upsample(before, kind, factor, causal=causal, padding=padding)])
        self.resnets = nn.ModuleList(
            ResidualBlock(before // factor, causal=causal, padding=padding) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.upsamplers, *self.resnets):
            x = block(x)
        return x


class Downsample(nn.Module):
    """Frames and pixels become channels, with a residual that is averaged to the number of channels."""

    def __init__(self, before: int, width: int, kind: str, *, causal: bool, padding: str) -> None:
        super().__init__()
        self.frames, self.side = RESAMPLINGS[kind]
        parts = self.frames * self.side * self.side
        self.group = before * parts // width
        self.conv = TimeConv3d(before, width // parts, causal=causal, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, : self.frames - 1], x], dim=2)  # the first frame stays one frame
        residual = self._gather(x).unflatten(1, (-1, self.group)).mean(dim=2)
        return self._gather(self.conv(x)) + residual

    def _gather(self, x_BCTHW: Tensor) -> Tensor:
        """(B,C,T*f,H*s,W*s) -> (B,C*f*s*s,T,H,W)."""
        x = (
            x_BCTHW.unflatten(4, (-1, self.side))
            .unflatten(3, (-1, self.side))
            .unflatten(2, (-1, self.frames))
        )
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


class DownBlock(nn.Module):
    """Residual blocks, then downsampling."""

    def __init__(self, before: int, width: int, depth: int, kind: str, *, causal: bool, padding: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(before, causal=causal, padding=padding) for _ in range(depth)
        )
        self.downsamplers = nn.ModuleList([Downsample(before, width, kind, causal=causal, padding=padding)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.downsamplers):
            x = block(x)
        return x


class Decoder(nn.Module):
    """diffusers' LTX2VideoDecoder3d: a convolution, the middle, stages from small to large, the last convolution."""

    def __init__(self, config: Ltx2VaeConfig) -> None:
        super().__init__()
        causal, padding = config.decoder_causal, config.decoder_spatial_padding_mode
        widths, depths = config.decoder_block_out_channels[::-1], config.decoder_layers_per_block[::-1]
        self.patch = config.patch_size
        self.conv_in = TimeConv3d(config.latent_channels, widths[0], causal=causal, padding=padding)
        self.mid_block = Blocks(widths[0], depths[0], causal=causal, padding=padding)
        # diffusers reverses the factors, and not the types of the upsamplings.
        stages = zip(widths, depths[1:], config.upsample_type, config.upsample_factor[::-1], strict=True)
        self.up_blocks = nn.ModuleList(
            UpBlock(width, depth, kind, factor, causal=causal, padding=padding)
            for width, depth, kind, factor in stages
        )
        last = widths[-1] // config.upsample_factor[0]
        out = config.out_channels * self.patch**2
        self.conv_out = TimeConv3d(last, out, causal=causal, padding=padding)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x_BCTHW))
        for stage in self.up_blocks:
            x = stage(x)
        x = self.conv_out(F.silu(pixel_norm(x)))
        batch, channels, frames, height, width = x.shape
        side = self.patch
        # Channels are (colour, column of the patch, row of the patch).
        x = x.reshape(batch, channels // side**2, side, side, frames, height, width)
        x = x.permute(0, 1, 4, 5, 3, 6, 2)
        return x.reshape(batch, channels // side**2, frames, height * side, width * side)


class Encoder(nn.Module):
    """diffusers' LTX2VideoEncoder3d, up to the one channel of the logarithm of the variance."""

    def __init__(self, config: Ltx2VaeConfig) -> None:
        super().__init__()
        causal, padding = config.encoder_causal, config.encoder_spatial_padding_mode
        self.patch = config.patch_size
        widths = config.block_out_channels
        befores = (config.latent_channels, *widths[:-1])
        self.conv_in = TimeConv3d(
            config.in_channels * self.patch**2, befores[0], causal=causal, padding=padding
        )
        stages = zip(befores, widths, config.layers_per_block[:-1], config.downsample_type, strict=True)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, width, depth, kind, causal=causal, padding=padding)
            for before, width, depth, kind in stages
        )
        self.mid_block = Blocks(widths[-1], config.layers_per_block[-1], causal=causal, padding=padding)
        self.conv_out = TimeConv3d(widths[-1], config.latent_channels + 1, causal=causal, padding=padding)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        side = self.patch
        x = x_BCTHW.unflatten(4, (-1, side)).unflatten(3, (-1, side))  # (B,C,T,H,p,W,p)
        x = self.conv_in(x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3))
        for stage in self.down_blocks:
            x = stage(x)
        moments: Tensor = self.conv_out(F.silu(pixel_norm(self.mid_block(x))))
        return moments


def _at(x: Tensor, axis: int, index: int) -> Tensor:
    """One frame, row or column, with its axis. A slice of it would have a size that torch.export does not know as 1."""
    return x.select(axis, index).unsqueeze(axis)


def pixel_norm(x: Tensor) -> Tensor:
    """diffusers' PerChannelRMSNorm: each pixel divided by the root of its channels' mean square. fp32."""
    x_fp32 = x.float()
    mean_square = x_fp32.pow(2).mean(dim=1, keepdim=True)
    return (x_fp32 / torch.sqrt(mean_square + NORM_EPS)).to(x.dtype)
