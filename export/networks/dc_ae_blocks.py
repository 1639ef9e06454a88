"""The blocks of DC-AE: residual convolutions, EfficientViT with multi-scale linear attention, up- and downsampling."""

# B batch, C channels, H/W picture, N = H*W tokens, K heads over all scales, D head dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.graph.ops.relu_linear_attention.torch_op import DIFFUSERS_EPS, relu_linear_attention
from ditc.export.networks.layers import RMSNorm, to_nchw, to_tokens

NORM_EPS = 1e-5
FFN_RATIO = 4  # diffusers' default for GLUMBConv, which DC-AE uses
FACTOR = 2  # every stage doubles or halves the picture
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}


def make_block(
    kind: str, channels: int, *, head_dim: int, norm: str, activation: str, scales: tuple[int, ...]
) -> nn.Module:
    """A ResBlock or an EfficientViTBlock, (B,C,H,W) -> (B,C,H,W)."""
    if kind == "ResBlock":
        return ResBlock(channels, norm, activation)
    return EfficientViTBlock(channels, head_dim, norm, scales)


def make_norm(kind: str, channels: int) -> nn.Module:
    """A norm for (B,C,H,W)."""
    if kind == "rms_norm":
        return RMSNorm(channels, NORM_EPS, bias=True, dim_of_channels=1)
    return BatchNorm(channels)


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x))))."""

    def __init__(self, channels: int, norm: str, activation: str) -> None:
        super().__init__()
        self.nonlinearity = ACTIVATIONS[activation]()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = make_norm(norm, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv2(self.nonlinearity(self.conv1(x_BCHW))))
        return out + x_BCHW


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then Mix-FFN, each with a residual."""

    def __init__(self, channels: int, head_dim: int, norm: str, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(channels, head_dim, norm, scales)
        self.conv_out = ConvolutionalGLUMBConv(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        x_BCHW = x_BCHW + to_nchw(self.attn(to_tokens(x_BCHW), height, width), height, width)
        return x_BCHW + self.conv_out(x_BCHW)


class ConvolutionalGLUMBConv(nn.Module):
    """Mix-FFN with a norm, in NCHW: at this picture size and ratio, a token layout would need large transposes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = FFN_RATIO * channels
        self.conv_inverted = nn.Conv2d(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = RMSNorm(channels, NORM_EPS, bias=True, dim_of_channels=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x, gate = self.conv_depth(F.silu(self.conv_inverted(x_BCHW))).chunk(2, dim=1)
        out: Tensor = self.norm(self.conv_point(x * F.silu(gate)))
        return out


class MultiscaleLinearAttention(nn.Module):
    """ReLU linear attention over q, k, v and over their convolved copies, with one set of heads per scale."""

    def __init__(self, channels: int, head_dim: int, norm: str, scales: tuple[int, ...]) -> None:
        super().__init__()
        heads = channels // head_dim
        inner = heads * head_dim
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(
            Aggregation(inner, heads, kernel_size) for kernel_size in scales
        )
        self.to_out = nn.Linear(inner * (1 + len(scales)), channels, bias=False)
        self.norm_out = (
            RMSNorm(channels, NORM_EPS, bias=True) if norm == "rms_norm" else BatchNorm(channels, tokens=True)
        )

    def forward(self, x_BNC: Tensor, height: int, width: int) -> Tensor:
        qkv_BNC = torch.cat([self.to_q(x_BNC), self.to_k(x_BNC), self.to_v(x_BNC)], dim=2)
        scales = [qkv_BNC]
        if len(self.to_qkv_multiscale):
            qkv_BCHW = to_nchw(qkv_BNC, height, width)
            scales += [to_tokens(aggregate(qkv_BCHW)) for aggregate in self.to_qkv_multiscale]
        # As in training: consecutive channels hold one head's q, k and v, although the projections are not interleaved.
        q, k, v = torch.cat(scales, dim=2).unflatten(2, (-1, 3, self.head_dim)).unbind(3)
        out: Tensor = self.norm_out(self.to_out(relu_linear_attention(q, k, v, DIFFUSERS_EPS).flatten(2)))
        return out


class Aggregation(nn.Module):
    """q, k and v of one more scale: a depthwise convolution, then a 1x1 convolution within each head."""

    def __init__(self, inner: int, heads: int, kernel_size: int) -> None:
        super().__init__()
        channels = 3 * inner
        self.proj_in = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False
        )
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=3 * heads, bias=False)

    def forward(self, qkv_BCHW: Tensor) -> Tensor:
        out: Tensor = self.proj_out(self.proj_in(qkv_BCHW))
        return out


class BatchNorm(nn.Module):
    """BatchNorm2d in evaluation: the mean and variance of training, as one scale and one shift per channel, in fp32.

    It has no num_batches_tracked, which is a count of training.

    Args:
        tokens: the input is (B,N,C), not (B,C,H,W).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, tokens: bool = False) -> None:
        super().__init__()
        self.tokens = tokens
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.float() / torch.sqrt(self.running_var.float() + NORM_EPS)
        shift = self.bias.float() - self.running_mean.float() * scale
        if not self.tokens:
            scale, shift = scale[:, None, None], shift[:, None, None]
        return (x.float() * scale + shift).to(x.dtype)


class Downsample(nn.Module):
    """Halve the picture: by a strided convolution, or by a convolution and pixel_unshuffle.

    The shortcut is a pixel_unshuffle with averaged channels.
    """

    def __init__(self, in_channels: int, out_channels: int, kind: str, shortcut: bool = True) -> None:
        super().__init__()
        self.unshuffle = kind == "pixel_unshuffle"
        self.group = in_channels * FACTOR**2 // out_channels if shortcut else 0
        stride = 1 if self.unshuffle else FACTOR
        width = out_channels // FACTOR**2 if self.unshuffle else out_channels
        self.conv = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(x_BCHW)
        if self.unshuffle:
            out = F.pixel_unshuffle(out, FACTOR)
        if self.group:
            out = out + average_channels(F.pixel_unshuffle(x_BCHW, FACTOR), self.group)
        return out


class Upsample(nn.Module):
    """Double the picture: by interpolation and a convolution, or by a convolution and pixel_shuffle.

    The shortcut is a pixel_shuffle of repeated channels.
    """

    def __init__(self, in_channels: int, out_channels: int, kind: str, shortcut: bool = True) -> None:
        super().__init__()
        self.interpolate = kind == "interpolate"
        self.repeats = out_channels * FACTOR**2 // in_channels if shortcut else 0
        self.conv = nn.Conv2d(
            in_channels, out_channels if self.interpolate else out_channels * FACTOR**2, 3, padding=1
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.interpolate:
            out: Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=FACTOR, mode="nearest"))
        else:
            out = F.pixel_shuffle(self.conv(x_BCHW), FACTOR)
        if self.repeats:
            out = out + F.pixel_shuffle(repeat_channels(x_BCHW, self.repeats), FACTOR)
        return out


def repeat_channels(x_BCHW: Tensor, repeats: int) -> Tensor:
    """Each channel `repeats` times in a row: repeat_interleave(dim=1), in ops that export with dynamic sizes."""
    return x_BCHW[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def average_channels(x_BCHW: Tensor, group: int) -> Tensor:
    """The mean of each group of consecutive channels."""
    return x_BCHW.unflatten(1, (-1, group)).mean(dim=2)
