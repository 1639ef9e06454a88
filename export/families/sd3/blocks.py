"""One block of SD3's transformer: joint attention over image and text, and what modulates it."""

# R rows, N image tokens, S text tokens, D width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.families.sd3.config import Sd3Config
from ditc.export.graph.ops.attention.torch_op import attention
from ditc.export.networks.layers import LayerNorm, RMSNorm

NORM_EPS = 1e-6  # for every norm in the network; diffusers hard-codes it too
FF_RATIO = 4


class AdaNorm(nn.Module):
    """LayerNorm without weights of its own, modulated by the timestep, as in diffusers' adaptive norms.

    The chunks are in diffusers' order: shift before scale in a block, scale before shift where a stream ends
    (AdaLayerNormContinuous). Stability's files have shift first everywhere.

    Args:
        chunks: number of modulation vectors: 2 where a stream ends, 6 in a block, 9 in a block with a second
            self-attention (SD35AdaLayerNormZeroX).
    """

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width)
        self.norm = LayerNorm(width, NORM_EPS)

    def forward(self, x_RND: Tensor, time_RD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The modulated tokens, and what the block applies later.

        With 6 chunks that is gate, shift_ff, scale_ff and gate_ff, (R,1,D) each. With 9 chunks the second
        self-attention's modulated tokens and its gate follow. With 2 chunks it is empty.
        """
        normed, factors = self.norm(x_RND), self.linear(time_RD)[:, None].chunk(self.chunks, dim=2)
        if self.chunks == 2:
            scale, shift = factors
            return normed * (1 + scale) + shift, ()
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = factors
        rest: tuple[Tensor, ...] = (gate, shift_ff, scale_ff, gate_ff)
        if second:
            second_shift, second_scale, second_gate = second
            rest = (*rest, normed * (1 + second_scale) + second_shift, second_gate)
        return normed * (1 + scale) + shift, rest


class JointBlock(nn.Module):
    """One attention over image and text together, then a feed-forward for each stream.

    Args:
        dual: the image stream also has a self-attention of its own (MMDiT-X).
        last: this is the last block, where the text stream ends.
    """

    def __init__(self, config: Sd3Config, *, dual: bool, last: bool) -> None:
        super().__init__()
        self.last = last
        self.norm1 = AdaNorm(config.width, 9 if dual else 6)
        self.norm1_context = AdaNorm(config.width, 2 if last else 6)
        self.attn = JointAttention(config, last=last)
        self.attn2 = SelfAttention(config) if dual else None
        self.norm2 = LayerNorm(config.width, NORM_EPS)
        self.ff = FeedForward(config.width)
        if not last:
            self.norm2_context = LayerNorm(config.width, NORM_EPS)
            self.ff_context = FeedForward(config.width)

    def forward(self, image_RND: Tensor, text_RSD: Tensor, time_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams after the block, in the dtype of the inputs. The block computes in the dtype of its weights."""
        dtype, inner = image_RND.dtype, self.norm1.linear.weight.dtype
        image, text = self._forward(image_RND.to(inner), text_RSD.to(inner), time_RD.to(inner))
        return image.to(dtype), text.to(dtype)

    def _forward(self, image: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        modulated, (gate, shift_ff, scale_ff, gate_ff, *second) = self.norm1(image, time)
        modulated_text, rest = self.norm1_context(text, time)
        out, text_out = self.attn(modulated, modulated_text)
        image = image + gate * out
        if self.attn2 is not None:
            modulated, gate = second
            image = image + gate * self.attn2(modulated)
        image = image + gate_ff * self.ff(self.norm2(image) * (1 + scale_ff) + shift_ff)
        if self.last:
            return image, text
        gate, shift_ff, scale_ff, gate_ff = rest
        text = text + gate * text_out
        return image, text + gate_ff * self.ff_context(self.norm2_context(text) * (1 + scale_ff) + shift_ff)


class SelfAttention(nn.Module):
    """Softmax attention of one stream. qk-norm covers one head at a time."""

    def __init__(self, config: Sd3Config) -> None:
        super().__init__()
        width, head_dim = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.scale = head_dim**-0.5
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_q = _qk_norm(config)
        self.norm_k = _qk_norm(config)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, image_RND: Tensor) -> Tensor:
        out: Tensor = self.to_out[0](attention(*self._qkv(image_RND), self.scale).flatten(2))
        return out

    def _qkv(self, image_RND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each (R,N,heads,head_dim)."""
        q, k, v = (self._split(linear(image_RND)) for linear in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def _split(self, x_RND: Tensor) -> Tensor:
        return x_RND.unflatten(2, (self.heads, -1))


class JointAttention(SelfAttention):
    """One softmax attention over both streams, image before text. Each stream has its own projections."""

    def __init__(self, config: Sd3Config, *, last: bool) -> None:
        super().__init__(config)
        width = config.width
        self.add_q_proj = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.norm_added_q = _qk_norm(config)
        self.norm_added_k = _qk_norm(config)
        self.to_add_out = None if last else nn.Linear(width, width)

    def forward(self, image_RND: Tensor, text_RSD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        joint = (
            torch.cat(pair, dim=1)
            for pair in zip(self._qkv(image_RND), self._text_qkv(text_RSD), strict=True)
        )
        out = attention(*joint, self.scale).flatten(2)
        count = image_RND.shape[1]
        image, text = self.to_out[0](out[:, :count]), out[:, count:]
        return image, text if self.to_add_out is None else self.to_add_out(text)

    def _text_qkv(self, text_RSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projections = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (self._split(linear(text_RSD)) for linear in projections)
        return self.norm_added_q(q), self.norm_added_k(k), v


def _qk_norm(config: Sd3Config) -> nn.Module:
    return nn.Identity() if config.qk_norm is None else RMSNorm(config.attention_head_dim, NORM_EPS)


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear, under diffusers' names: net.0.proj and net.2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GeluLinear(width, FF_RATIO * width), nn.Identity(), nn.Linear(FF_RATIO * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class GeluLinear(nn.Module):
    """GELU (tanh form) of a Linear."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")
