"""Run the Triton kernels on torch tensors: on CUDA for the op, on a CPU in Triton's interpreter."""

# B batch, N tokens, H heads, D head dim, S shares of the tokens

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditc.export.graph.ops.relu_linear_attention.ptx import WARPS, load_kernels, sizes
from ditc.runtime.plugins.linear_attention import SHARE


def relu_linear_attention_triton(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Compute `relu_linear_attention` with kv_kernel and out_kernel. q, k, v: (B,N,H,D), contiguous or not."""
    return launch_pair(load_kernels(), (q, k, v), (), eps, sizes(q.shape[3]), WARPS)


def relu_linear_attention_fused(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Compute it with fused_kernel, one program per head, as the TensorRT QDP plugin does."""
    return launch_fused(load_kernels(), (q, k, v), (), eps, sizes(q.shape[3]), WARPS)


def launch_pair(
    kernels: Any,
    qkv: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    eps: float,
    sizes: dict[str, int],
    warps: int,
) -> Tensor:
    """Launch kv_kernel and out_kernel of a module of Triton kernels, which take the tables after q, k and v."""
    q, k, v, *tables_ = (x.contiguous() for x in (*qkv, *tables))
    batch, tokens, heads, _ = q.shape
    shares, block = -(-tokens // SHARE), sizes["BLOCK_D"]
    kv = q.new_empty((batch * heads, shares, block, block), dtype=torch.float32)
    total = q.new_empty((batch * heads, shares, block), dtype=torch.float32)
    out = torch.empty_like(q)
    constants = {**sizes, "num_warps": warps}
    kernels.kv_kernel[(shares, batch * heads)](k, v, *tables_, kv, total, tokens, heads, SHARE, **constants)
    blocks = -(-tokens // sizes["BLOCK_N"])
    kernels.out_kernel[(blocks, batch * heads)](
        q, *tables_, kv, total, out, tokens, heads, shares, eps, **constants
    )
    return out


def launch_fused(
    kernels: Any,
    qkv: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    eps: float,
    sizes: dict[str, int],
    warps: int,
) -> Tensor:
    """Launch fused_kernel of a module of Triton kernels."""
    q, *others = (x.contiguous() for x in (*qkv, *tables))
    batch, tokens, heads, _ = q.shape
    out = torch.empty_like(q)
    constants = {"EPS": eps, **sizes, "num_warps": warps}
    kernels.fused_kernel[(batch * heads,)](q, *others, tokens, heads, out, **constants)
    return out
