"""Sinkhorn-Knopp, written once for the eye: the definition that every other form is compared with."""

# B batch, N tokens, S streams

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12  # F.normalize's: a sum below it is not divided by


def sinkhorn_reference(logits_BNSS: Tensor, iterations: int) -> Tensor:
    """exp(logits), columns and then rows divided by their sums, again and again, in fp64.

    hyper-connections 0.4.11, mHCv2.sinkhorn_knopps (mHC, arXiv 2512.24880, equation 9). After it every row sums to 1,
    and every column nearly so. Dim -2 counts the rows that a column's sum runs over.

    Returns:
        (B,N,S,S) fp64.
    """
    alpha = torch.exp(logits_BNSS.double() - logits_BNSS.double().amax(-2, keepdim=True))
    for _ in range(iterations):
        alpha = alpha / alpha.sum(-2, keepdim=True).clamp_min(EPS)
        alpha = alpha / alpha.sum(-1, keepdim=True).clamp_min(EPS)
    return alpha
