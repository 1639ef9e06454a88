"""ReLU linear attention with rotary positions in its plainest form, with which every other form is compared."""

# B batch, N tokens, H heads, D head dim

from __future__ import annotations

import torch
from torch import Tensor


def rotary_linear_attention_reference(
    q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """sum_j rot(relu(q_i)).rot(relu(k_j)) v_j / (sum_j relu(q_i).relu(k_j) + eps), in fp64 through N x N scores.

    SANA-Video (arXiv 2509.24695), section 3.2, with the eps of diffusers' SanaLinearAttnProcessor3_0. Channels 2i and
    2i+1 of a head are the real and the imaginary part of one number, which rot multiplies by cos_i + i sin_i.

    Args:
        cos, sin: (N,D/2).

    Returns:
        (B,N,H,D) fp64.
    """
    q, k, v = (x.transpose(1, 2).to(torch.float64) for x in (q_BNHD, k_BNHD, v_BNHD))
    q, k = q.relu(), k.relu()
    turn = torch.complex(cos.to(torch.float64), sin.to(torch.float64))
    q_turned, k_turned = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn for x in (q, k))
    numerator_BHNN = (q_turned @ k_turned.conj().transpose(-1, -2)).real
    denominator_BHNN = q @ k.transpose(-1, -2)
    out = (numerator_BHNN @ v) / (denominator_BHNN.sum(-1, keepdim=True) + eps)
    return out.transpose(1, 2)
