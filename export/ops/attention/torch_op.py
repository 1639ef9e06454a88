"""The op `ditc::attention` for PyTorch: one node in an exported graph, one function in eager mode."""

# B batch, N queries, S keys, H heads, D head dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("ditc::attention", mutates_args=())  # type: ignore[untyped-decorator]
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v a head; the softmax is fp32.

    fp32 inputs take PyTorch's own kernel, which never holds the N x S scores. 16-bit inputs take the graph's order
    of rounding: q is scaled before the product (unscaled scores can pass fp16's range), and the weights are rounded
    before they meet v.

    Args:
        q: (B,N,H,D), any float dtype. k, v: (B,S,H,D). Token-major: a Linear's output, viewed.

    Returns:
        (B,N,H,D) in the dtype of q.
    """
    q_BHND, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q, k, v))
    if q.dtype == torch.float32:
        out = F.scaled_dot_product_attention(q_BHND, k_BHSD, v_BHSD, scale=scale)
    else:
        scores = (q_BHND * scale) @ k_BHSD.transpose(2, 3)
        out = torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v_BHSD
    return out.transpose(1, 2).contiguous()


@attention.register_fake  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
