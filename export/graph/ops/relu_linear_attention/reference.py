"""ReLU linear attention in its plainest form: the definition that every other form is compared with."""

# B batch, N tokens, H heads, D head dim

from __future__ import annotations

import torch
from torch import Tensor


def relu_linear_attention_reference(q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, eps: float) -> Tensor:
    """sum_j relu(q_i).relu(k_j) v_j / (sum_j relu(q_i).relu(k_j) + eps), in fp64 through the N x N scores.

    SANA (arXiv 2410.10629), equation 1, with the eps of diffusers' SanaLinearAttnProcessor2_0. The form is
    quadratic in N on purpose: it shares no order of products with the linear forms.

    Returns:
        (B,N,H,D) fp64.
    """
    q, k, v = (x.transpose(1, 2).to(torch.float64) for x in (q_BNHD, k_BNHD, v_BNHD))
    scores_BHNN = q.relu() @ k.relu().transpose(-1, -2)
    out = (scores_BHNN @ v) / (scores_BHNN.sum(-1, keepdim=True) + eps)
    return out.transpose(1, 2)
