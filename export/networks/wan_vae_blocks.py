"""The blocks of AutoencoderKLWan: causal convolutions over time, residual blocks, attention per frame, resampling.

A block sees one chunk of a video. What it needs of earlier chunks comes from a Stream, and goes back into it.
"""

# B batch, C channels, T frames of a chunk, H/W picture

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.graph.ops.attention.torch_op import attention
from ditc.export.networks.layers import ConvAsLinear, to_nchw, to_tokens

KEPT = 2  # frames before a chunk that a convolution over three frames reads
NORM_EPS = 1e-12  # of torch.nn.functional.normalize


class Stream:
    """The frames that the convolutions of a network keep from one chunk to the next, in the order of their use.

    Args:
        kept: what the last chunk left; None at the first chunk.

    Attributes:
        left: what this chunk leaves.
    """

    collects = True  # so that the exporter traces every block that gets it (export/graph/trace_repeats.py)

    def __init__(self, kept: Sequence[Tensor] | None) -> None:
        self.first = kept is None
        self._kept = iter(kept or ())
        self.left: list[Tensor] = []

    def after_kept(self, x_BCTHW: Tensor, frames: int) -> Tensor:
        """x with the kept frames before it. Before the first chunk, frames are zeros, as in diffusers."""
        if self.first:
            x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, frames, 0))
        else:
            x_BCTHW = torch.cat([next(self._kept), x_BCTHW], dim=2)
        self.left.append(x_BCTHW[:, :, -frames:].clone())  # a view would keep the whole chunk in memory
        return x_BCTHW

    def skip(self, left: Tensor) -> None:
        """Leave frames for the next chunk without reading any."""
        self.left.append(left)


class CausalConv3d(nn.Conv3d):
    """A convolution over three frames, of which the last is the present one, and 3x3 or single pixels."""

    def __init__(self, before: int, width: int, side: int = 3) -> None:
        super().__init__(before, width, (3, side, side), padding=(0, side // 2, side // 2))

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        return super().forward(stream.after_kept(x_BCTHW, KEPT))


class ChannelNorm(nn.Module):
    """diffusers' WanRMS_norm: each pixel's channels divided by their norm, times sqrt(channels) and a gain. fp32."""

    def __init__(self, width: int, *, picture: bool = False) -> None:
        super().__init__()
        self.scale = width**0.5
        self.gamma = nn.Parameter(torch.ones(width, *((1, 1) if picture else (1, 1, 1))))

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        norm = torch.sqrt(x_fp32.pow(2).sum(dim=1, keepdim=True)).clamp(min=NORM_EPS)
        return (x_fp32 / norm).to(x.dtype) * self.scale * self.gamma


class ResidualBlock(nn.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(before)
        self.conv1 = CausalConv3d(before, width)
        self.norm2 = ChannelNorm(width)
        self.conv2 = CausalConv3d(width, width)
        self.conv_shortcut = nn.Identity() if before == width else nn.Conv3d(before, width, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)), stream)
        inner = self.conv2(F.silu(self.norm2(inner)), stream)
        out: Tensor = self.conv_shortcut(x) + inner
        return out


class FrameAttention(nn.Module):
    """Attention with one head over all cells of a frame, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.norm = ChannelNorm(width, picture=True)
        self.to_qkv = ConvAsLinear(width, 3 * width)
        self.proj = ConvAsLinear(width, width)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frames = _as_pictures(x_BCTHW)
        q, k, v = (y[:, :, None] for y in self.to_qkv(to_tokens(self.norm(frames))).chunk(3, dim=2))
        out = self.proj(attention(q, k, v, self.scale)[:, :, 0])
        return x_BCTHW + _as_frames(to_nchw(out, frames.shape[2], frames.shape[3]), x_BCTHW)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width, width) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(width)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, stream))
        out: Tensor = self.resnets[1](x, stream)
        return out


class Upsample(nn.Module):
    """Twice the height and width, half the channels; with `frames`, twice the frames except at the first chunk."""

    def __init__(self, width: int, *, frames: bool) -> None:
        super().__init__()
        # In diffusers, the first module of the sequence enlarges the picture.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(width, width // 2, 3, padding=1))
        self.time_conv = CausalConv3d(width, 2 * width, side=1) if frames else None

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None:
            x_BCTHW = self._with_twice_the_frames(self.time_conv, x_BCTHW, stream)
        pictures = F.interpolate(_as_pictures(x_BCTHW), scale_factor=2.0, mode="nearest")
        return _as_frames(self.resample(pictures), x_BCTHW)

    def _with_twice_the_frames(self, time_conv: CausalConv3d, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        if stream.first:
            # The first frame stays one frame, and the convolution of the next chunk does not see it ("Rep" in
            # diffusers): it sees zeros.
            stream.skip(torch.zeros_like(x_BCTHW).repeat(1, 1, KEPT, 1, 1))
            return x_BCTHW
        # Channels are (of the earlier frame, of the later frame).
        pairs = time_conv(x_BCTHW, stream).unflatten(1, (2, x_BCTHW.shape[1]))
        return pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


class Downsample(nn.Module):
    """Half the height and width; with `frames`, half the frames except at the first chunk."""

    def __init__(self, width: int, *, frames: bool) -> None:
        super().__init__()
        # In diffusers, the first module of the sequence pads the picture at the right and at the bottom.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(width, width, 3, stride=2))
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if frames else None

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        pictures = F.pad(_as_pictures(x_BCTHW), (0, 1, 0, 1))
        x_BCTHW = _as_frames(self.resample(pictures), x_BCTHW)
        if self.time_conv is None:
            return x_BCTHW
        if stream.first:  # the first frame stays one frame; the next chunk's convolution sees it
            stream.skip(x_BCTHW)
            return x_BCTHW
        return self.time_conv(stream.after_kept(x_BCTHW, 1))


def _as_pictures(x_BCTHW: Tensor) -> Tensor:
    """(B,C,T,H,W) -> (B*T,C,H,W)."""
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def _as_frames(pictures: Tensor, like_BCTHW: Tensor) -> Tensor:
    """(B*T,C,H,W) -> (B,C,T,H,W), with B and T of another tensor."""
    return pictures.unflatten(0, (like_BCTHW.shape[0], like_BCTHW.shape[2])).transpose(1, 2)
