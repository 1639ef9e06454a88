"""The op `ditc::relu_linear_attention` for PyTorch: one node in an exported graph, one function in eager mode."""

# B batch, N tokens, H heads, D head dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# As in SanaLinearAttnProcessor2_0 and SanaMultiscaleLinearAttention (diffusers 0.42.1). Sana's native code has 1e-8.
DIFFUSERS_EPS = 1e-15


@torch.library.custom_op("ditc::relu_linear_attention", mutates_args=())  # type: ignore[untyped-decorator]
def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Linear attention with ReLU feature maps; everything after the ReLU is computed in fp32.

    The denominator comes from the same product as the numerator, because v gets one more row, of ones. This and the
    order of the products follow diffusers' SanaLinearAttnProcessor2_0. The form in a graph (onnx_function.py) has a
    faster order of the same sums.

    Args:
        q, k, v: (B,N,H,D) in any float type. They are token-major: the output of a Linear, viewed.
        eps: added to the denominator.

    Returns:
        (B,N,H,D) in q's type.
    """
    q_BHDN = q.relu().float().permute(0, 2, 3, 1)
    k_BHND = k.relu().float().permute(0, 2, 1, 3)
    v1_BHEN = F.pad(v.float().permute(0, 2, 3, 1), (0, 0, 0, 1), value=1.0)
    out = (v1_BHEN @ k_BHND) @ q_BHDN
    out = out[:, :, :-1] / (out[:, :, -1:] + eps)
    return out.permute(0, 3, 1, 2).to(q.dtype).contiguous()


def use_kernels_on_cuda() -> None:
    """Compute the op on CUDA tensors with the pair of Triton kernels. Raises MissingExtra without Triton."""
    from ditc.export.graph.ops.relu_linear_attention.ptx import load_kernels
    from ditc.export.graph.ops.relu_linear_attention.triton_op import relu_linear_attention_triton

    load_kernels()
    relu_linear_attention.register_kernel("cuda")(relu_linear_attention_triton)


@relu_linear_attention.register_fake  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
