"""Softmax attention, written once for the eye: the definition that every other form is compared with."""

# B batch, N queries, S keys, H heads, D head dim

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(q_BNHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v a head, in fp64 (Attention Is All You Need, arXiv 1706.03762, equation 1).

    Returns:
        (B,N,H,D) fp64.
    """
    q, k, v = (x.to(torch.float64) for x in (q_BNHD, k_BSHD, v_BSHD))
    scores_BHNS = torch.einsum("bnhd,bshd->bhns", q, k) * scale
    weights_BHNS = scores_BHNS.exp() / scores_BHNS.exp().sum(-1, keepdim=True)
    return torch.einsum("bhns,bshd->bnhd", weights_BHNS, v)
