"""Softmax attention in its plainest form: the definition that every other form is compared with."""

# B batch, N queries, S keys, H heads, D head dim

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(
    q_BNHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    scale: float,
    bias: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(scale * q k^T) v per head, in fp64 (Attention Is All You Need, arXiv 1706.03762, equation 1).

    Args:
        bias: broadcast to (B,H,N,S) and added after the soft cap.
        softcap: the c of c * tanh(score / c); 0 for none.

    Returns:
        (B,N,H,D) fp64.
    """
    q, k, v = (x.to(torch.float64) for x in (q_BNHD, k_BSHD, v_BSHD))
    scores_BHNS = torch.einsum("bnhd,bshd->bhns", q, k) * scale
    if softcap:
        scores_BHNS = softcap * (scores_BHNS / softcap).tanh()
    if bias is not None:
        scores_BHNS = scores_BHNS + bias.to(torch.float64)
    weights_BHNS = (scores_BHNS - scores_BHNS.amax(-1, keepdim=True)).exp()
    weights_BHNS = weights_BHNS / weights_BHNS.sum(-1, keepdim=True)
    return torch.einsum("bhns,bshd->bnhd", weights_BHNS, v)
