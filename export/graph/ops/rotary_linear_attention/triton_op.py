"""Run the Triton kernels on torch tensors: on CUDA for the op, on a CPU in Triton's interpreter."""

# B batch, N tokens, H heads, D head dim

from __future__ import annotations

from torch import Tensor

from ditc.export.graph.ops.relu_linear_attention.triton_op import launch_fused, launch_pair
from ditc.export.graph.ops.rotary_linear_attention.ptx import WARPS, load_kernels, sizes


def rotary_linear_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """Compute `rotary_linear_attention` with kv_kernel and out_kernel. Inputs are contiguous or not."""
    return launch_pair(load_kernels(), (q, k, v), (cos, sin), eps, sizes(q.shape[3]), WARPS)


def rotary_linear_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """Compute it with fused_kernel, one program per head, as the TensorRT QDP plugin does."""
    return launch_fused(load_kernels(), (q, k, v), (cos, sin), eps, sizes(q.shape[3]), WARPS)
