"""The op `ditc::attention` for PyTorch: one node in an exported graph, one function in eager mode."""

# B batch, N queries, S keys, H heads, D head dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The bias of a masked key. It absorbs any score, so Softmax gives the key exactly 0. It is finite, so a row in which
# every key is masked stays finite too.
MASKED = -torch.finfo(torch.float32).max


@torch.library.custom_op("ditc::attention", mutates_args=())  # type: ignore[untyped-decorator]
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, softcap: float = 0.0
) -> Tensor:
    """softmax(cap(scale * q k^T) + bias) v per head; softmax, soft cap and bias are computed in fp32.

    fp32 inputs without a soft cap go through PyTorch's own kernel, which never holds the N x S scores. Other inputs
    are rounded where the graph rounds: q is scaled before the product, because unscaled scores can exceed fp16's
    range, and the weights are rounded before they are multiplied by v.

    Args:
        q: (B,N,H,D) in any float type.
        k, v: (B,S,H,D). All three are token-major: the output of a Linear, viewed.
        bias: fp32, broadcast to (B,H,N,S). A mask is 0 for keys that are attended to and MASKED for others.
        softcap: the c of c * tanh(score / c), which comes before the bias as in ONNX's Attention; 0 for none.

    Returns:
        (B,N,H,D) in q's type.
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
