"""The op as Triton kernels: the same three as in relu_linear_attention/kernels.py, with tables of cosines and sines.

cos and sin are (N,D/2) fp32, contiguous. Rotated keys and queries are fp32, so both products are fp32 products.
"""

# Triton gives annotations a meaning of its own, so the kernels have none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

# B batch, N tokens, H heads, D head dim; q, k, v, out are (B,N,H,D), contiguous; S shares of the tokens

import triton
import triton.language as tl

from ditc.export.graph.ops.relu_linear_attention.kernels import add_shares, attend, store_share, sums


@triton.jit
def kv_kernel(
    k,
    v,
    cos,
    sin,
    kv,
    total,
    N,
    H,
    share,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (S, B*H). kv (B*H,S,BLOCK_D,BLOCK_D) and total (B*H,S,BLOCK_D) are fp32. share: tokens per program."""
    s, head = tl.program_id(0), tl.program_id(1)
    base = (head // H).to(tl.int64) * N * H * D + (head % H) * D
    begin = s * share
    end = tl.minimum(begin + share, N)
    found, totals = sums(k, v, cos, sin, base, begin, end, H * D, D, BLOCK_N, BLOCK_D)
    slot = (head * tl.num_programs(0) + s).to(tl.int64)
    store_share(kv, total, slot, found, totals, BLOCK_D)


@triton.jit
def out_kernel(
    q,
    cos,
    sin,
    kv,
    total,
    out,
    N,
    H,
    S,
    eps,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (blocks of BLOCK_N tokens, B*H). Adds the S shares of kv and total, then writes the output."""
    head = tl.program_id(1)
    base = (head // H).to(tl.int64) * N * H * D + (head % H) * D
    found, totals = add_shares(kv, total, head, S, BLOCK_D)
    first = tl.program_id(0) * BLOCK_N
    attend(q, cos, sin, out, found, totals, base, first, N, H * D, eps, D, BLOCK_N, BLOCK_D)


@triton.jit
def fused_kernel(
    q,
    k,
    v,
    cos,
    sin,
    N,
    H,
    out,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B*H,). The arguments have the order of a TensorRT QDP kernel: inputs, integers, outputs."""
    head = tl.program_id(0)
    base = (head // H).to(tl.int64) * N * H * D + (head % H) * D
    found, totals = sums(k, v, cos, sin, base, 0, N, H * D, D, BLOCK_N, BLOCK_D)
    for first in range(0, N, BLOCK_N):
        attend(q, cos, sin, out, found, totals, base, first, N, H * D, EPS, D, BLOCK_N, BLOCK_D)
