"""Layers that the networks share. They are token-major, and their norm statistics are fp32.

A 1x1 convolution is a Linear on tokens, so it fuses, quantizes and shares scales like any other GEMM. Only the 3x3
depthwise convolution needs NCHW.
"""

# B batch, N tokens, C channels, F expanded channels, p side of a patch

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINUSOID_WIDTH = 256  # the width of the sinusoid in every timestep embedding here, as in diffusers


class ConvAsLinear(nn.Linear):
    """A convolution whose stride is its kernel, as a Linear over flattened patches.

    Args:
        kernel_size: side of the patch. The input has in_channels * kernel_size**2 features, channel first.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels * kernel_size**2, out_channels, bias=bias)
        self.conv_shape: tuple[int, ...] = (out_channels, in_channels, kernel_size, kernel_size)


class FrameConvAsLinear(ConvAsLinear):
    """The same for a 3-D convolution over patches of single frames, whose kernel is (1,p,p)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias)
        self.conv_shape = (out_channels, in_channels, 1, kernel_size, kernel_size)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, computed in fp32 and cast back to the input's type."""

    def __init__(self, dim: int, eps: float, affine: bool = False) -> None:
        super().__init__()
        self.shape = (dim,)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """diffusers' RMSNorm: statistics and division are fp32; weight and bias are applied in the weight's type.

    Args:
        dim_of_channels: -1 for tokens; 1 for (B,C,H,W), which avoids the two transposes that diffusers makes.
    """

    def __init__(self, dim: int, eps: float, bias: bool = False, dim_of_channels: int = -1) -> None:
        super().__init__()
        self.eps = eps
        self.dim = dim_of_channels
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        # A division, not rsqrt and a product, because ONNX Runtime fuses this pattern (SimplifiedLayerNormFusion).
        x_fp32 = x_fp32 / torch.sqrt(x_fp32.pow(2).mean(self.dim, keepdim=True) + self.eps)
        x = x_fp32.to(self.weight.dtype) * self._along(self.weight)
        return x if self.bias is None else x + self._along(self.bias)

    def _along(self, parameter: Tensor) -> Tensor:
        return parameter if self.dim == -1 else parameter[:, None, None]


class TimestepEmbedder(nn.Module):
    """Sinusoid in fp32, then Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_WIDTH, width)
        self.linear_2 = nn.Linear(width, width)
        half = SINUSOID_WIDTH // 2
        # A plain tensor, not a buffer, because module.to(float16) must not round it. It is computed as in diffusers.
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu") / half
        self.frequencies = torch.exp(exponent)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        angles = t.float()[:, None] * self.frequencies.to(t.device)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)
        hidden: Tensor = self.linear_2(F.silu(self.linear_1(sinusoid)))
        return hidden


class GLUMBConv(nn.Module):
    """Sana's Mix-FFN on tokens: expand, 3x3 depthwise convolution, gate, project.

    It is diffusers' GLUMBConv without the residual. The zero padding of the depthwise convolution tells Sana where a
    token is.
    """

    def __init__(self, dim: int, expand_ratio: float) -> None:
        super().__init__()
        hidden = int(expand_ratio * dim)
        self.conv_inverted = ConvAsLinear(dim, 2 * hidden)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = ConvAsLinear(hidden, dim, bias=False)

    def forward(self, x_BNC: Tensor, height: int, width: int) -> Tensor:
        x_BNF = F.silu(self.conv_inverted(x_BNC))
        x_BFHW = self.conv_depth(to_nchw(x_BNF, height, width))
        x_BFHW, gate_BFHW = x_BFHW.chunk(2, dim=1)
        out_BNC: Tensor = self.conv_point(to_tokens(x_BFHW * F.silu(gate_BFHW)))
        return out_BNC


def to_nchw(x_BNC: Tensor, height: int, width: int) -> Tensor:
    """(B,H*W,C) -> (B,C,H,W)."""
    return x_BNC.transpose(1, 2).unflatten(2, (height, width))


def to_tokens(x_BCHW: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,H*W,C)."""
    return x_BCHW.flatten(2).transpose(1, 2)


def to_patches(x_BCHW: Tensor, p: int) -> Tensor:
    """(B,C,h*p,w*p) -> (B,h*w,C*p*p), the input of ConvAsLinear."""
    if p == 1:
        return to_tokens(x_BCHW)
    x = x_BCHW.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B C h p w p
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_patches(x_BNF: Tensor, p: int, height: int, width: int) -> Tensor:
    """(B,h*w,p*p*C) -> (B,C,h*p,w*p). In a final layer's output, the channels are the innermost dimension."""
    if p == 1:
        return to_nchw(x_BNF, height, width)
    x = x_BNF.unflatten(2, (p, p, -1)).unflatten(1, (height, width))  # B h w p p C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
