"""AutoencoderKL, the autoencoder of SD3 and its relatives (arXiv 2112.10752), as export-grade decoder and encoder.

The reference is diffusers 0.42.1's AutoencoderKL. Scale, shift and range of the latents are inside: a pipeline does no
arithmetic. The encoder gives the mode of the posterior; diffusers' image-to-image draws a sample from it.

fp32 in 16-bit networks: group norms and softmax.
"""

# B batch, C channels, H/W picture, h/w latents, N = H*W tokens

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.graph.ops.attention.torch_op import attention
from ditc.export.networks.autoencoder_kl_config import AutoencoderKlConfig as AutoencoderKlConfig
from ditc.export.networks.layers import to_nchw, to_tokens
from ditc.export.networks.loading import build_empty, load_strict

NORM_EPS = 1e-6


def load_kl_decoder(
    config: AutoencoderKlConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> KlVaeDecoder:
    """The decoder with the weights of a diffusers vae/ directory.

    Raises:
        CheckpointError: a tensor is missing, left over or misshapen.
    """
    return _load_both(config, tensors, dtype, unread="vae_encoder")[0]


def load_kl_encoder(
    config: AutoencoderKlConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> KlVaeEncoder:
    """The encoder with the weights of a diffusers vae/ directory.

    Raises:
        CheckpointError: a tensor is missing, left over or misshapen.
    """
    return _load_both(config, tensors, dtype, unread="vae_decoder")[1]


def _load_both(
    config: AutoencoderKlConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, unread: str
) -> tuple[KlVaeDecoder, KlVaeEncoder]:
    decoder, encoder = build_empty(lambda: KlVaeDecoder(config)), build_empty(lambda: KlVaeEncoder(config))
    load_strict({"vae_decoder": decoder, "vae_encoder": encoder}, tensors, dtype, unread=(unread,))
    return decoder, encoder


class KlVaeDecoder(nn.Module):
    """Latents as the denoiser sees them -> picture."""

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
    """Picture -> latents as the denoiser sees them: the mode of the posterior."""

    weights_below = ""

    def __init__(self, config: AutoencoderKlConfig) -> None:
        super().__init__()
        self.scaling_factor, self.shift_factor = config.scaling_factor, config.shift_factor or 0.0
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,H,W) fp32 in [-1,1] -> (B,C,h,w) fp32."""
        moments = self.quant_conv(self.encoder(image.to(self.encoder.conv_in.weight.dtype)))
        mean, _log_variance = moments.chunk(2, dim=1)
        return (mean.float() - self.shift_factor) * self.scaling_factor


class Decoder(nn.Module):
    """diffusers' Decoder: a convolution, the middle, stages from small to large, norm, SiLU, out."""

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
    """diffusers' Encoder: stages from large to small, then the middle; out come mean and log variance."""

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


class UpBlock(nn.Module):
    """Residual blocks, then twice the size."""

    def __init__(self, before: int, width: int, groups: int, depth: int, *, up: bool) -> None:
        super().__init__()
        self.resnets = _resnets(before, width, groups, depth)
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        return _through((*self.resnets, *self.upsamplers), x)


class DownBlock(nn.Module):
    """Residual blocks, then half the size."""

    def __init__(self, before: int, width: int, groups: int, depth: int, *, down: bool) -> None:
        super().__init__()
        self.resnets = _resnets(before, width, groups, depth)
        self.downsamplers = nn.ModuleList([Downsample(width)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        return _through((*self.resnets, *self.downsamplers), x)


class MidBlock(nn.Module):
    """Residual block, attention over the whole picture, residual block."""

    def __init__(self, width: int, groups: int, has_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([PictureAttention(width, groups)] if has_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        return _through((self.resnets[0], *self.attentions, self.resnets[1]), x)


class ResnetBlock(nn.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, before: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(before, groups)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1)
        self.norm2 = GroupNorm(width, groups)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Identity() if before == width else nn.Conv2d(before, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x_BCHW))))))
        out: Tensor = self.conv_shortcut(x_BCHW) + inner
        return out


class PictureAttention(nn.Module):
    """One head over all cells of the picture, with a residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.group_norm = GroupNorm(width, groups)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        tokens_BNC = to_tokens(self.group_norm(x_BCHW))
        q, k, v = (linear(tokens_BNC)[:, :, None] for linear in (self.to_q, self.to_k, self.to_v))
        out_BNC = self.to_out[0](attention(q, k, v, self.scale)[:, :, 0])
        return x_BCHW + to_nchw(out_BNC, x_BCHW.shape[2], x_BCHW.shape[3])


class GroupNorm(nn.GroupNorm):
    """GroupNorm computed in fp32 and cast back to the input's type."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(groups, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(
            x.dtype
        )


class Upsample(nn.Module):
    """Every pixel four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Downsample(nn.Module):
    """A convolution with stride 2 that is padded at the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


def _resnets(before: int, width: int, groups: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList(ResnetBlock(before if i == 0 else width, width, groups) for i in range(depth))


def _through(modules: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x
