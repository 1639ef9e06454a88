"""Residual connections of lucidrains/mmdit 0.3.0: plain ones, hyper-connections, and manifold-constrained ones.

A branch is attention or a feedforward, and uses its connection twice: `width` makes the branch's input, and `depth`
adds the branch's result. Residual streams have a dimension of their own before the channels, (B,N,S,D). Upstream's
HyperConnections fold it into the batch; its mHCv2 keeps it separate, as here.

Upstream chooses the stream that a new branch reads first with Python's random, not with torch's generator, so two
networks made after torch.manual_seed(0) differ. A checkpoint stores the choice in static_alpha.
"""

# B batch, N tokens, S streams, D channels

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditc.export.families.lucidrains.layers import StreamNorm
from ditc.export.graph.ops.sinkhorn.torch_op import sinkhorn

SINKHORN_ITERATIONS = 20  # mHCv2's default, which MMDiT does not let a caller change
Kept = tuple[Tensor, Tensor | None]


class Residual(nn.Module):
    """One stream, which the branch reads and to which the branch's result is added."""

    def width(self, x: Tensor) -> tuple[Tensor, Kept]:
        """The branch's input, and what `depth` needs."""
        return x, (x, None)

    def depth(self, out: Tensor, kept: Kept) -> Tensor:
        """The residual after the branch."""
        return kept[0] + out


class HyperConnections(nn.Module):
    """Hyper-connections (arXiv 2409.19606, appendix J, algorithm 2): tanh weights from the token, plus static ones.

    Args:
        add_branch_out_to_residual: False for the last branch of a modality whose result is not used. `depth` is then
            never called, and its parameters do not exist.
    """

    def __init__(self, streams: int, *, dim: int, add_branch_out_to_residual: bool = True) -> None:
        super().__init__()
        self.norm = StreamNorm(dim)
        self.static_alpha = nn.Parameter(torch.zeros(streams, streams + 1))
        self.dynamic_alpha_fn = nn.Parameter(torch.zeros(dim, streams + 1))
        self.dynamic_alpha_scale = nn.Parameter(torch.zeros(()))
        self.continues = add_branch_out_to_residual
        if add_branch_out_to_residual:
            self.static_beta = nn.Parameter(torch.zeros(streams))
            self.dynamic_beta_fn = nn.Parameter(torch.zeros(dim))
            self.dynamic_beta_scale = nn.Parameter(torch.zeros(()))

    def width(self, x_BNSD: Tensor) -> tuple[Tensor, Kept]:
        """The branch's input (B,N,D), and for `depth` the mixed streams and the result's weight in each of them."""
        normed = self.norm(x_BNSD).to(x_BNSD.dtype)
        alpha = (normed @ self.dynamic_alpha_fn).tanh() * self.dynamic_alpha_scale + self.static_alpha
        if not self.continues:
            return _mixed(alpha[..., :1], x_BNSD)[..., 0, :], (x_BNSD, None)
        dynamic_beta = (normed @ self.dynamic_beta_fn[:, None]).tanh() * self.dynamic_beta_scale
        beta_BNS1 = dynamic_beta + self.static_beta[:, None]
        mixed = _mixed(alpha, x_BNSD)
        return mixed[..., 0, :], (mixed[..., 1:, :], beta_BNS1)

    def depth(self, out_BND: Tensor, kept: Kept) -> Tensor:
        """The streams after the branch."""
        return _added(out_BND, kept)


class ManifoldConstrainedHyperConnections(nn.Module):
    """mHC (arXiv 2512.24880): a nearly doubly stochastic matrix, from Sinkhorn-Knopp, mixes the streams in fp32."""

    def __init__(self, streams: int, *, dim: int, add_branch_out_to_residual: bool = True) -> None:
        super().__init__()
        self.norm = StreamNorm(dim)
        self.static_alpha = nn.Parameter(torch.zeros(streams, streams + 1))
        self.dynamic_alpha_fn = nn.Parameter(torch.zeros(1, dim, streams + 1))
        self.pre_branch_scale = nn.Parameter(torch.zeros(1))
        self.continues = add_branch_out_to_residual
        if add_branch_out_to_residual:
            self.residual_scale = nn.Parameter(torch.zeros(1))
            self.static_beta = nn.Parameter(torch.zeros(streams, 1, 1))
            self.dynamic_beta_fn = nn.Parameter(torch.zeros(dim, 1))
            self.h_post_scale = nn.Parameter(torch.zeros(()))

    def width(self, x_BNSD: Tensor) -> tuple[Tensor, Kept]:
        """The same as HyperConnections.width."""
        normed, x = self.norm(x_BNSD), x_BNSD.float()
        logits, static = normed @ self.dynamic_alpha_fn[0].float(), self.static_alpha.float()
        pre = (logits[..., :1] * self.pre_branch_scale.float() + static[:, :1]).sigmoid()
        branch = _mixed(pre, x)[..., 0, :].to(x_BNSD.dtype)
        if not self.continues:
            return branch, (x_BNSD, None)
        residual = sinkhorn(
            logits[..., 1:] * self.residual_scale.float() + static[:, 1:], SINKHORN_ITERATIONS
        )
        dynamic_beta = (normed @ self.dynamic_beta_fn.float()) * self.h_post_scale.float()
        beta = (dynamic_beta + self.static_beta[..., 0].float()).sigmoid() * 2
        return branch, (_mixed(residual, x).to(x_BNSD.dtype), beta.to(x_BNSD.dtype))

    def depth(self, out_BND: Tensor, kept: Kept) -> Tensor:
        """The same as HyperConnections.depth, with the product in fp32."""
        streams, beta = kept
        assert beta is not None
        return streams + (out_BND.float()[..., None, :] * beta.float()).to(streams.dtype)


class StreamEmbed(nn.Module):
    """Copies the tokens to every stream, and adds the stream's own embedding."""

    def __init__(self, streams: int, dim: int) -> None:
        super().__init__()
        self.stream_embed = nn.Parameter(torch.zeros(streams, dim))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND[..., None, :] + self.stream_embed


class AttentionPool(nn.Module):
    """Reduces the streams to one by a softmax over them in each channel (Enformer's attention pool)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_attn_logits = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BNSD: Tensor) -> Tensor:
        weights = torch.softmax(self.to_attn_logits(x_BNSD).float(), dim=-2).to(x_BNSD.dtype)
        return (x_BNSD * weights).sum(-2)


class Expand(nn.Module):
    """Copies the tokens to every stream."""

    def __init__(self, streams: int) -> None:
        super().__init__()
        self.streams = streams

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND[..., None, :].expand(-1, -1, self.streams, -1)


class Sum(nn.Module):
    """Reduces the streams to one by their sum."""

    def forward(self, x_BNSD: Tensor) -> Tensor:
        return x_BNSD.sum(-2)


def _mixed(weights_BNST: Tensor, x_BNSD: Tensor) -> Tensor:
    """(B,N,T,D): sum_s weights[s,t] * x[s]."""
    return weights_BNST.transpose(-1, -2) @ x_BNSD


def _added(out_BND: Tensor, kept: Kept) -> Tensor:
    streams_BNSD, beta_BNS1 = kept
    assert beta_BNS1 is not None
    return streams_BNSD + out_BND[..., None, :] * beta_BNS1
