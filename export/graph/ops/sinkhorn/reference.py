"""Sinkhorn-Knopp in its plainest form: the definition that every other form is compared with."""

# B batch, N tokens, S streams

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12  # the eps of F.normalize: a smaller sum is replaced by it before the division


def sinkhorn_reference(logits_BNSS: Tensor, iterations: int) -> Tensor:
    """Start from exp(logits); in each iteration divide columns, then rows, by their sums. Computed in fp64.

    Source: hyper-connections 0.4.11, mHCv2.sinkhorn_knopps (mHC, arXiv 2512.24880, equation 9). At the end every row
    sums to 1, and every column nearly so. Dim -2 numbers the rows, so a column's sum runs over it.

    Returns:
        (B,N,S,S) fp64.
    """
    alpha = torch.exp(logits_BNSS.double() - logits_BNSS.double().amax(-2, keepdim=True))
    for _ in range(iterations):
        alpha = alpha / alpha.sum(-2, keepdim=True).clamp_min(EPS)
        alpha = alpha / alpha.sum(-1, keepdim=True).clamp_min(EPS)
    return alpha
