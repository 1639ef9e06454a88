"""Layers of lucidrains/mmdit 0.3.0, with upstream's parameter names: norms, feedforward, soft clamp.

The arithmetic is that of mmdit 0.3.0, x-transformers 2.31.10 and hyper-connections 0.4.11. One thing differs: norm
statistics are fp32 in every precision, where upstream computes them in the input's type.
"""

# B batch, N tokens, H heads, D head dim

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.networks.layers import LayerNorm
from ditc.runtime.errors import CheckpointError

LAYER_NORM_EPS = 1e-5  # nn.LayerNorm's default, which upstream keeps
NORMALIZE_EPS = 1e-12  # F.normalize's: the norm's lower bound, not a term that is added inside the mean
# FeedForward's arguments that change nothing once weights are loaded and dropout is off.
FF_TRAINING_ONLY = frozenset({"dropout", "sublayer_dropout", "zero_init_output", "output_proj_depth"})
FF_ARGUMENTS = frozenset(
    {"mult", "glu", "glu_mult_bias", "swish", "relu_squared", "post_act_ln", "no_bias", "softclamp_value"}
)


def l2_normalized(x: Tensor) -> Tensor:
    """F.normalize(x, dim=-1), computed and returned in fp32."""
    x = x.float()
    # The square root of a sum instead of a 2-norm, because the check of fp32 islands recognises this pattern.
    return x / torch.sqrt((x * x).sum(-1, keepdim=True)).clamp_min(NORMALIZE_EPS)


def softclamp(x: Tensor, value: float) -> Tensor:
    """tanh(x / value) * value (Gemma 2's logit soft cap, arXiv 2408.00118, section 2)."""
    return (x / value).tanh() * value


class MultiHeadRMSNorm(nn.Module):
    """RMS norm with one gamma per head. Tokens are (B,N,H,D) here, and (B,H,N,D) upstream."""

    def __init__(self, dim: int, heads: int = 1) -> None:
        super().__init__()
        self.scale: float = dim**0.5
        self.gamma = nn.Parameter(torch.ones(heads, 1, dim))

    def forward(self, x_BNHD: Tensor) -> Tensor:
        return (l2_normalized(x_BNHD) * self.gamma[:, 0].float() * self.scale).to(x_BNHD.dtype)


class RMSNorm(nn.Module):
    """x-transformers' RMSNorm, which follows the last block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale: float = dim**0.5
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (l2_normalized(x) * self.scale * self.g.float()).to(x.dtype)


class StreamNorm(nn.Module):
    """hyper-connections' RMSNorm, whose gamma is stored as an offset from 1. It returns fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale: float = dim**0.5
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return l2_normalized(x) * self.scale * (self.gamma.float() + 1)


class AdaptiveLayerNorm(nn.Module):
    """LayerNorm whose gamma and beta come from the condition. Gamma itself is the factor, not 1 + gamma.

    The condition comes with the SiLU applied, because all layers share that result.
    """

    def __init__(self, dim: int, dim_cond: int | None = None) -> None:
        super().__init__()
        self.ln = LayerNorm(dim, LAYER_NORM_EPS, affine=dim_cond is None)
        self.to_cond = None if dim_cond is None else condition_projection(dim_cond, 2 * dim)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        x = self.ln(x)
        if self.to_cond is None or cond is None:
            return x
        gamma, beta = self.to_cond["2"](cond)[:, None].chunk(2, dim=-1)
        return x * gamma + beta


def condition_projection(dim_cond: int, width: int) -> nn.ModuleDict:
    """The Linear of upstream's Sequential(Rearrange, SiLU, Linear), under the name that it has there.

    The trunk applies the SiLU: every layer needs it for the same tensor, so one node in the graph serves them all.
    """
    return nn.ModuleDict({"2": nn.Linear(dim_cond, width)})


class FeedForward(nn.Module):
    """x-transformers' FeedForward: a Linear (or GLU), an activation, and a Linear. GELU is the exact form.

    Raises:
        CheckpointError: an argument is not implemented here.
    """

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__()
        check_feedforward(kwargs)
        inner = int(dim * kwargs.get("mult", 4))
        bias = not kwargs.get("no_bias", False)
        clamp = kwargs.get("softclamp_value")
        activation = _activation(kwargs)
        first: nn.Module
        if kwargs.get("glu", False):
            first = GLU(dim, inner, activation, mult_bias=bool(kwargs.get("glu_mult_bias", False)))
        else:
            clamped = () if clamp is None else (SoftClamp(clamp),)
            first = nn.Sequential(nn.Linear(dim, inner, bias=bias), *clamped, activation)
        norm = (GammaLayerNorm(inner),) if kwargs.get("post_act_ln", False) else ()
        # Identity takes the place of upstream's Dropout, because positions in the Sequential are part of the names.
        self.ff = nn.Sequential(first, *norm, nn.Identity(), nn.Linear(inner, dim, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ff(x)
        return out


def check_feedforward(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that FeedForward does not implement. Raises CheckpointError."""
    unknown = sorted(
        name for name, value in kwargs.items() if value and name not in FF_ARGUMENTS | FF_TRAINING_ONLY
    )
    if unknown:
        raise CheckpointError(
            f"ff_kwargs has {', '.join(f'{name} = {kwargs[name]!r}' for name in unknown)}, which is not implemented",
            hint=f"implemented arguments: {', '.join(sorted(FF_ARGUMENTS))}",
        )


class GLU(nn.Module):
    """x-transformers' GLU: one half of the projection times the activation of the other half.

    Its Linear has a bias, whatever no_bias says.
    """

    def __init__(self, dim: int, inner: int, activation: nn.Module, mult_bias: bool) -> None:
        super().__init__()
        self.act = activation
        self.proj = nn.Linear(dim, 2 * inner)
        self.mult_bias = nn.Parameter(torch.ones(inner)) if mult_bias else None

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = up * self.act(gate)
        return out if self.mult_bias is None else out * self.mult_bias


class GammaLayerNorm(nn.Module):
    """x-transformers' LayerNorm, which has a gamma but no beta."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln = LayerNorm(dim, LAYER_NORM_EPS)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ln(x) * self.gamma
        return out


class SoftClamp(nn.Module):
    """`softclamp` as a module."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return softclamp(x, self.value)


class SquaredReLU(nn.Module):
    """relu(x) ** 2."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x * x


def _activation(kwargs: Mapping[str, Any]) -> nn.Module:
    if kwargs.get("relu_squared", False):
        return SquaredReLU()
    return nn.SiLU() if kwargs.get("swish", False) else nn.GELU()
