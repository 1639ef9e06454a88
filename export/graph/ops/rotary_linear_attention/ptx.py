"""Compile the op's kernels ahead of time to PTX, as relu_linear_attention/ptx.py does."""

from __future__ import annotations

from functools import cache
from typing import Any

from ditc.export.graph.ops.relu_linear_attention.ptx import (
    TARGET_SM,
    Kernel,
    as_json,
    block_d,
    compiled_fused,
    compiled_pair,
)
from ditc.runtime.errors import MissingExtra
from ditc.runtime.spec import DType

# Tokens per program, and warps. SANA-Video's heads are 112 wide, so a program holds 128 x 128 fp32 sums: 64 registers
# in each of 256 threads. For such heads, the pair of kernels needs 72 KiB of shared memory with 16 tokens (Triton 3.9),
# which every GPU from sm80 on has, and 128 KiB with 32. They are not tuned, because no GPU was at hand.
BLOCK_N = 16
WARPS = 8
TABLES = ("cos", "sin")


@cache
def compile_pair(dtype: DType, head_dim: int, sm: int = TARGET_SM) -> tuple[Kernel, Kernel]:
    """Compile kv_kernel and out_kernel. Raises MissingExtra without Triton."""
    return compiled_pair(load_kernels(), dtype, sizes(head_dim), sm, warps=WARPS, tables=TABLES)


@cache
def compile_fused(dtype: DType, head_dim: int, eps: float, sm: int = TARGET_SM) -> Kernel:
    """Compile fused_kernel, with eps as a constant. Raises MissingExtra without Triton."""
    constants = {"EPS": eps, **sizes(head_dim)}
    return compiled_fused(load_kernels(), dtype, constants, sm, warps=WARPS, tables=TABLES)


def pair_as_json(dtype: DType, head_dim: int, sm: int = TARGET_SM) -> str:
    """The pair of kernels as the JSON that the plugin carries into the engine; `runtime.plugins` reads it."""
    return as_json(compile_pair(dtype, head_dim, sm), dtype, sizes(head_dim))


def sizes(head_dim: int) -> dict[str, int]:
    """The constants of the kernels."""
    return {"D": head_dim, "BLOCK_N": BLOCK_N, "BLOCK_D": block_d(head_dim)}


def load_kernels() -> Any:
    """Import the module of the Triton kernels. Raises MissingExtra without Triton."""
    try:
        from ditc.export.graph.ops.rotary_linear_attention import kernels
    except ImportError as e:
        raise MissingExtra("triton", "plugin") from e
    return kernels
