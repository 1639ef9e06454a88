"""The op as Triton kernels: a pair for many tokens, and one fused kernel for few.

    kv_kernel      kv[d,e] = sum_n relu(k[n,d]) v[n,e] and total[d] = sum_n relu(k[n,d]), over one share of the tokens
    out_kernel     out[n] = relu(q[n]) @ sum(kv) / (relu(q[n]) . sum(total) + eps)
    fused_kernel   both steps in one program per head

`total` is the product with the row of ones that torch_op.py appends to v. Sums and products are fp32: 16-bit k and v
are multiplied exactly and added in fp32, and q is widened, so that kv is never rounded. ReLU keeps NaN, as torch's
does. This module needs Triton (the extra `plugin`), so it is imported only where the kernels are used.

`sums` and `attend` also compute rotary_linear_attention, where they are given tables of cosines and sines.
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
def _rotated(x, x_ND, at, inside, cos, sin, n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rotated ReLU of x in fp32: channels 2i and 2i+1 are a pair. x_ND is the ReLU of x at `at`, unrotated."""
    d = tl.arange(0, BLOCK_D)
    other_ND = _relu(tl.load(x + at + (1 - 2 * (d % 2))[None, :], mask=inside, other=0.0)).to(tl.float32)
    row = n[:, None] * (D // 2) + (d // 2)[None, :]
    cos_ND = tl.load(cos + row, mask=inside, other=0.0)
    sin_ND = tl.load(sin + row, mask=inside, other=0.0) * (2 * (d % 2) - 1)[None, :]
    return x_ND.to(tl.float32) * cos_ND + other_ND * sin_ND


@triton.jit
def sums(
    k,
    v,
    cos,
    sin,
    base,
    begin,
    end,
    stride,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """kv (BLOCK_D, BLOCK_D) and total (BLOCK_D,) over the tokens begin <= n < end of one head.

    With tables (cos is not None), kv has rotated keys in fp32, and total unrotated ones.
    """
    d = tl.arange(0, BLOCK_D)
    kv = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        at = base + n[:, None] * stride + d[None, :]
        inside = (n < end)[:, None] & (d < D)[None, :]
        k_ND = _relu(tl.load(k + at, mask=inside, other=0.0))
        v_NE = tl.load(v + at, mask=inside, other=0.0)
        total += tl.sum(k_ND.to(tl.float32), axis=0)
        if cos is not None:
            k_ND = _rotated(k, k_ND, at, inside, cos, sin, n, D, BLOCK_D)
            v_NE = v_NE.to(tl.float32)
        kv += tl.dot(tl.trans(k_ND), v_NE, input_precision="ieee")
    return kv, total


@triton.jit
def attend(
    q,
    cos,
    sin,
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
    """Write the output of one block of tokens of one head. With tables, the numerator has rotated queries."""
    d = tl.arange(0, BLOCK_D)
    n = first + tl.arange(0, BLOCK_N)
    at = base + n[:, None] * stride + d[None, :]
    inside = (n < N)[:, None] & (d < D)[None, :]
    q_ND = _relu(tl.load(q + at, mask=inside, other=0.0)).to(tl.float32)
    denominator = tl.sum(q_ND * total[None, :], axis=1) + eps
    if cos is not None:
        q_ND = _rotated(q, q_ND, at, inside, cos, sin, n, D, BLOCK_D)
    numerator = tl.dot(q_ND, kv, input_precision="ieee")
    tl.store(out + at, (numerator / denominator[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_share(kv, total, slot, found, totals, BLOCK_D: tl.constexpr):
    """Write the sums of one share of the tokens of one head."""
    d = tl.arange(0, BLOCK_D)
    tl.store(kv + slot * BLOCK_D * BLOCK_D + d[:, None] * BLOCK_D + d[None, :], found)
    tl.store(total + slot * BLOCK_D + d, totals)


@triton.jit
def add_shares(kv, total, head, S, BLOCK_D: tl.constexpr):
    """The sums of one head over all S shares."""
    d = tl.arange(0, BLOCK_D)
    found = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    totals = tl.zeros((BLOCK_D,), tl.float32)
    for s in range(0, S):
        slot = (head * S + s).to(tl.int64)
        found += tl.load(kv + slot * BLOCK_D * BLOCK_D + d[:, None] * BLOCK_D + d[None, :])
        totals += tl.load(total + slot * BLOCK_D + d)
    return found, totals


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
    end = tl.minimum(begin + share, N)
    found, totals = sums(k, v, None, None, base, begin, end, H * D, D, BLOCK_N, BLOCK_D)
    slot = (head * tl.num_programs(0) + s).to(tl.int64)
    store_share(kv, total, slot, found, totals, BLOCK_D)


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
    found, totals = add_shares(kv, total, head, S, BLOCK_D)
    first = tl.program_id(0) * BLOCK_N
    attend(q, None, None, out, found, totals, base, first, N, H * D, eps, D, BLOCK_N, BLOCK_D)


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
    found, totals = sums(k, v, None, None, base, 0, N, H * D, D, BLOCK_N, BLOCK_D)
    for first in range(0, N, BLOCK_N):
        attend(q, None, None, out, found, totals, base, first, N, H * D, EPS, D, BLOCK_N, BLOCK_D)
