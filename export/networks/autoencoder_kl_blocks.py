"""The blocks of AutoencoderKL: residual convolutions, attention over the whole picture, upsampling, downsampling."""

# B batch, C channels, H/W picture, N = H*W tokens

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.graph.ops.attention.torch_op import attention
from ditc.export.networks.layers import to_nchw, to_tokens

NORM_EPS = 1e-6


class UpBlock(nn.Module):
    """Residual blocks, then (with `up`) upsampling to twice the size."""

    def __init__(self, before: int, width: int, groups: int, depth: int, *, up: bool) -> None:
        super().__init__()
        self.resnets = _resnets(before, width, groups, depth)
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        return _through((*self.resnets, *self.upsamplers), x)


class DownBlock(nn.Module):
    """Residual blocks, then (with `down`) downsampling to half the size."""

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
    """Attention with one head over all cells of the picture, with a residual."""

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
    """Nearest-neighbour upsampling by 2, then a convolution."""

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
