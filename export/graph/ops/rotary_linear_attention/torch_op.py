"""The op `ditc::rotary_linear_attention` for PyTorch: one node in an exported graph, one function in eager mode."""

# B batch, N tokens, H heads, D head dim

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("ditc::rotary_linear_attention", mutates_args=())  # type: ignore[untyped-decorator]
def rotary_linear_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Linear attention with ReLU feature maps, rotated in the numerator; everything after the ReLU is fp32.

    Args:
        q, k, v: (B,N,H,D) in any float type, D even. They are token-major: the output of a Linear, viewed.
        cos, sin: (N,D/2) fp32, for the pairs of channels (0,1), (2,3) and so on.
        eps: added to the denominator.

    Returns:
        (B,N,H,D) in q's type.
    """
    q_BNHD, k_BNHD = q.relu().float(), k.relu().float()
    q_BHND, k_BHDN = (
        _rotated(q_BNHD, cos, sin).transpose(1, 2),
        _rotated(k_BNHD, cos, sin).permute(0, 2, 3, 1),
    )
    numerator_BHND = q_BHND @ (k_BHDN @ v.float().transpose(1, 2))
    denominator_BNH1 = (q_BNHD * k_BNHD.sum(1, keepdim=True)).sum(3, keepdim=True) + eps
    return (numerator_BHND.transpose(1, 2) / denominator_BNH1).to(q.dtype).contiguous()


def _rotated(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotated pairs, all first members before all second ones: q . k does not depend on the order."""
    first, second = x_BNHD[..., 0::2], x_BNHD[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def use_kernels_on_cuda() -> None:
    """Compute the op on CUDA tensors with the pair of Triton kernels. Raises MissingExtra without Triton."""
    from ditc.export.graph.ops.rotary_linear_attention.ptx import load_kernels
    from ditc.export.graph.ops.rotary_linear_attention.triton_op import rotary_linear_attention_triton

    load_kernels()
    rotary_linear_attention.register_kernel("cuda")(rotary_linear_attention_triton)


@rotary_linear_attention.register_fake  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
