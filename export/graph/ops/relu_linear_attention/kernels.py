"""The op as Triton kernels: a pair for many tokens, and one fused kernel for few.

    kv_kernel      kv[d,e] = sum_n relu(k[n,d]) v[n,e] and total[d] = sum_n relu(k[n,d]), over one share of the tokens
    out_kernel     out[n] = relu(q[n]) @ sum(kv) / (relu(q[n]) . sum(total) + eps)
    fused_kernel   both steps in one program per head

`total` is the product with the row of ones that torch_op.py appends to v. Sums and products are fp32: 16-bit k and v
are multiplied exactly and added in fp32, and q is widened, so that kv is never rounded. ReLU keeps NaN, as torch's
does. This module needs Triton (the extra `plugin`), so it is imported only where the kernels are used.
"""

# Triton gives annotations a meaning of its own, so the kernels have none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

# B batch, N tokens, H heads, D head dim; q, k, v, out are (B,N,H,D), contiguous; S shares of the tokens

import triton
import triton.language as tl


@triton.jit
def _relu(x):
    return tl.where(x < 0, tl.zeros_like(x), x)


@triton.jit
def _sums(
    k,
    v,
    base,
    begin,
    end,
    stride,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """kv (BLOCK_D, BLOCK_D) and total (BLOCK_D,) over the tokens begin <= n < end of one head."""
    d = tl.arange(0, BLOCK_D)
    kv = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        at = base + n[:, None] * stride + d[None, :]
        inside = (n < end)[:, None] & (d < D)[None, :]
        k_ND = _relu(tl.load(k + at, mask=inside, other=0.0))
        v_NE = tl.load(v + at, mask=inside, other=0.0)
        kv += tl.dot(tl.trans(k_ND), v_NE, input_precision="ieee")
        total += tl.sum(k_ND.to(tl.float32), axis=0)
    return kv, total


@triton.jit
def _attend(
    q,
    out,
    kv,
    total,
    base,
    first,
    N,
    stride,
    eps,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the output of one block of tokens of one head."""
    d = tl.arange(0, BLOCK_D)
    n = first + tl.arange(0, BLOCK_N)
    at = base + n[:, None] * stride + d[None, :]
    inside = (n < N)[:, None] & (d < D)[None, :]
    q_ND = _relu(tl.load(q + at, mask=inside, other=0.0)).to(tl.float32)
    numerator = tl.dot(q_ND, kv, input_precision="ieee")
    denominator = tl.sum(q_ND * total[None, :], axis=1) + eps
    tl.store(out + at, (numerator / denominator[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def kv_kernel(
    k,
    v,
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
    sums, totals = _sums(k, v, base, begin, tl.minimum(begin + share, N), H * D, D, BLOCK_N, BLOCK_D)
    slot = (head * tl.num_programs(0) + s).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    tl.store(kv + slot * BLOCK_D * BLOCK_D + d[:, None] * BLOCK_D + d[None, :], sums)
    tl.store(total + slot * BLOCK_D + d, totals)


@triton.jit
def out_kernel(
    q,
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
    d = tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    totals = tl.zeros((BLOCK_D,), tl.float32)
    for s in range(0, S):
        slot = (head * S + s).to(tl.int64)
        sums += tl.load(kv + slot * BLOCK_D * BLOCK_D + d[:, None] * BLOCK_D + d[None, :])
        totals += tl.load(total + slot * BLOCK_D + d)
    first = tl.program_id(0) * BLOCK_N
    _attend(q, out, sums, totals, base, first, N, H * D, eps, D, BLOCK_N, BLOCK_D)


@triton.jit
def fused_kernel(
    q,
    k,
    v,
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
    sums, totals = _sums(k, v, base, 0, N, H * D, D, BLOCK_N, BLOCK_D)
    for first in range(0, N, BLOCK_N):
        _attend(q, out, sums, totals, base, first, N, H * D, EPS, D, BLOCK_N, BLOCK_D)
