"""The op `ditc::sinkhorn` for PyTorch: one node in an exported graph, one function in eager mode."""

# B batch, N tokens, S streams

from __future__ import annotations

import torch
from torch import Tensor

from ditc.export.graph.ops.sinkhorn.reference import EPS


@torch.library.custom_op("ditc::sinkhorn", mutates_args=())  # type: ignore[untyped-decorator]
def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Turn each token's S x S logits into a nearly doubly stochastic matrix.

    Args:
        logits: (B,N,S,S) fp32.
        iterations: how often columns and then rows are divided by their sums; at least 1.

    Returns:
        (B,N,S,S) fp32.
    """
    # Tokens come last, so that the sums over 4 streams are long vector additions.
    alpha_SSBN = logits.float().permute(2, 3, 0, 1).contiguous()
    alpha_SSBN = (alpha_SSBN - alpha_SSBN.amax(0, keepdim=True)).exp()
    for _ in range(iterations):
        alpha_SSBN = alpha_SSBN / alpha_SSBN.sum(0, keepdim=True).clamp_min(EPS)
        alpha_SSBN = alpha_SSBN / alpha_SSBN.sum(1, keepdim=True).clamp_min(EPS)
    return alpha_SSBN.permute(2, 3, 0, 1).contiguous()


@sinkhorn.register_fake  # type: ignore[untyped-decorator]
def _(logits: Tensor, iterations: int) -> Tensor:
    return torch.empty_like(logits, dtype=torch.float32, memory_format=torch.contiguous_format)
