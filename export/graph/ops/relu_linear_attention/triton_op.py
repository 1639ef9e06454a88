"""Run the Triton kernels on torch tensors: on CUDA for the op, on a CPU in Triton's interpreter."""

# B batch, N tokens, H heads, D head dim, S shares of the tokens

from __future__ import annotations

import torch
from torch import Tensor

from ditc.export.graph.ops.relu_linear_attention.ptx import BLOCK_N, WARPS, block_d
from ditc.runtime.plugins.relu_linear_attention import SHARE


def relu_linear_attention_triton(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Compute `relu_linear_attention` with kv_kernel and out_kernel. q, k, v: (B,N,H,D), contiguous or not."""
    from ditc.export.graph.ops.relu_linear_attention.kernels import kv_kernel, out_kernel

    q, k, v = (x.contiguous() for x in (q, k, v))
    batch, tokens, heads, dim = q.shape
    shares, block = -(-tokens // SHARE), block_d(dim)
    kv = q.new_empty((batch * heads, shares, block, block), dtype=torch.float32)
    total = q.new_empty((batch * heads, shares, block), dtype=torch.float32)
    out = torch.empty_like(q)
    sizes = {"D": dim, "BLOCK_N": BLOCK_N, "BLOCK_D": block, "num_warps": WARPS}
    kv_kernel[(shares, batch * heads)](k, v, kv, total, tokens, heads, SHARE, **sizes)
    blocks = -(-tokens // BLOCK_N)
    out_kernel[(blocks, batch * heads)](q, kv, total, out, tokens, heads, shares, eps, **sizes)
    return out


def relu_linear_attention_fused(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Compute it with fused_kernel, one program per head, as the TensorRT QDP plugin does."""
    from ditc.export.graph.ops.relu_linear_attention.kernels import fused_kernel

    q, k, v = (x.contiguous() for x in (q, k, v))
    batch, tokens, heads, dim = q.shape
    out = torch.empty_like(q)
    sizes = {"EPS": eps, "D": dim, "BLOCK_N": BLOCK_N, "BLOCK_D": block_d(dim), "num_warps": WARPS}
    fused_kernel[(batch * heads,)](q, k, v, tokens, heads, out, **sizes)
    return out
