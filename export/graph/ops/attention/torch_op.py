"""The op `ditc::attention` for PyTorch: one node in an exported graph, one function in eager mode."""

# B batch, N queries, S keys, H heads, D head dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The bias of a key that is masked: it absorbs any score, Softmax gives an exact 0, and a row of nothing else is finite.
MASKED = -torch.finfo(torch.float32).max


@torch.library.custom_op("ditc::attention", mutates_args=())  # type: ignore[untyped-decorator]
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, softcap: float = 0.0
) -> Tensor:
    """softmax(cap(scale * q k^T) + bias) v a head; the softmax, the soft cap and the bias are fp32.

    fp32 inputs without soft cap take PyTorch's own kernel, which never holds the N x S scores. Others take the graph's
    order of rounding: q is scaled before the product (unscaled scores can pass fp16's range), and the weights are
    rounded before they meet v.

    Args:
        q: (B,N,H,D), any float dtype. k, v: (B,S,H,D). Token-major: a Linear's output, viewed.
        bias: fp32, one that broadcasts to (B,H,N,S): a mask's MASKED for keys that are not attended to.
        softcap: c of c * tanh(score / c), before the bias, as ONNX's Attention has it; 0 for none.

    Returns:
        (B,N,H,D) in the dtype of q.
    """
    q_BHND, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q, k, v))
    if q.dtype == torch.float32 and not softcap:
        out = F.scaled_dot_product_attention(q_BHND, k_BHSD, v_BHSD, attn_mask=bias, scale=scale)
    else:
        scores = ((q_BHND * scale) @ k_BHSD.transpose(2, 3)).float()
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        if bias is not None:
            scores = scores + bias
        out = torch.softmax(scores, dim=-1).to(v.dtype) @ v_BHSD
    return out.transpose(1, 2).contiguous()


@attention.register_fake  # type: ignore[untyped-decorator]
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, softcap: float = 0.0
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
