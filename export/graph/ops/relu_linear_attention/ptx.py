"""Compile the op's kernels ahead of time to PTX, which needs Triton but no GPU.

PTX for one compute capability runs on every later one, because the driver finishes the compilation (CUDA programming
guide, "Just-in-Time Compilation"). So a file for sm80 also serves sm86, sm89, sm90 and sm120.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from ditc.runtime.errors import BuildError, MissingExtra
from ditc.runtime.spec import DType

# The number of tokens per program, and its number of warps. They suit 32-wide heads, whose 64 x 32 16-bit tiles of q, k
# and v fit into registers without spilling. They are not tuned, because no GPU was at hand.
BLOCK_N = 64
WARPS = 4
# The oldest generation whose tensor cores take bf16; sm75 is not supported.
TARGET_SM = 80

_TYPES = {DType.FLOAT32: "fp32", DType.FLOAT16: "fp16", DType.BFLOAT16: "bf16"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        threads: threads per block.
        shared_bytes: dynamic shared memory per block, in bytes.
    """

    name: str
    ptx: str
    threads: int
    shared_bytes: int


def block_d(head_dim: int) -> int:
    """The head dimension, rounded up to a size that tl.dot takes: a power of 2, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def compile_pair(dtype: DType, head_dim: int, sm: int = TARGET_SM) -> tuple[Kernel, Kernel]:
    """Compile kv_kernel and out_kernel. Raises MissingExtra without Triton."""
    return compiled_pair(load_kernels(), dtype, sizes(head_dim), sm, warps=WARPS)


@cache
def compile_fused(dtype: DType, head_dim: int, eps: float, sm: int = TARGET_SM) -> Kernel:
    """Compile fused_kernel, with eps as a constant because a TensorRT QDP kernel takes only integers.

    Raises:
        MissingExtra: Triton is not installed.
    """
    return compiled_fused(load_kernels(), dtype, {"EPS": eps, **sizes(head_dim)}, sm, warps=WARPS)


def pair_as_json(dtype: DType, head_dim: int, sm: int = TARGET_SM) -> str:
    """The pair of kernels as the JSON that the plugin carries into the engine; `runtime.plugins` reads it."""
    return as_json(compile_pair(dtype, head_dim, sm), dtype, sizes(head_dim))


def sizes(head_dim: int) -> dict[str, int]:
    """The constants of the kernels."""
    return {"D": head_dim, "BLOCK_N": BLOCK_N, "BLOCK_D": block_d(head_dim)}


# What follows also compiles the kernels of rotary_linear_attention, which take tables after q, k and v.


def compiled_pair(
    kernels: Any, dtype: DType, sizes: dict[str, int], sm: int, *, warps: int, tables: tuple[str, ...] = ()
) -> tuple[Kernel, Kernel]:
    """Compile kv_kernel and out_kernel of a module of Triton kernels.

    Args:
        tables: names of the kernels' fp32 arguments after q, k and v.
    """
    x, f, i = "*" + _TYPES[dtype], "*fp32", "i32"
    known = dict.fromkeys(tables, f)
    kv = {"k": x, "v": x, **known, "kv": f, "total": f, "N": i, "H": i, "share": i}
    out = {"q": x, **known, "kv": f, "total": f, "out": x, "N": i, "H": i, "S": i, "eps": "fp32"}
    return _compile(kernels.kv_kernel, kv, sizes, sm, warps), _compile(
        kernels.out_kernel, out, sizes, sm, warps
    )


def compiled_fused(
    kernels: Any,
    dtype: DType,
    constants: dict[str, Any],
    sm: int,
    *,
    warps: int,
    tables: tuple[str, ...] = (),
) -> Kernel:
    """Compile fused_kernel of a module of Triton kernels."""
    x, i = "*" + _TYPES[dtype], "i32"
    arguments = {"q": x, "k": x, "v": x, **dict.fromkeys(tables, "*fp32"), "N": i, "H": i, "out": x}
    return _compile(kernels.fused_kernel, arguments, constants, sm, warps)


def as_json(pair: tuple[Kernel, Kernel], dtype: DType, sizes: dict[str, int]) -> str:
    """A pair of kernels with its sizes, in the form that `runtime.plugins` reads."""
    kv, out = pair
    facts = {"block_n": sizes["BLOCK_N"], "block_d": sizes["BLOCK_D"], "head_dim": sizes["D"]}
    return json.dumps({"dtype": dtype.value, **facts, "kv": asdict(kv), "out": asdict(out)}, sort_keys=True)


def load_kernels() -> Any:
    """Import the module of the Triton kernels. Raises MissingExtra without Triton."""
    try:
        from ditc.export.graph.ops.relu_linear_attention import kernels
    except ImportError as e:
        raise MissingExtra("triton", "plugin") from e
    return kernels


def _compile(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], sm: int, warps: int
) -> Kernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        # Tensors begin at multiples of 256 bytes (runtime/sessions/device.py), so 16 bytes can be loaded at once.
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, kind in enumerate(signature.values())
            if kind.startswith("*")
        },
    )
    # Fused multiply-add is the default of Triton 3.9. It is set explicitly because 3.10 changes the default.
    options = {"num_warps": warps, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return Kernel(
        name=str(built.metadata.name),
        ptx=_without_scratch(_stripped(str(built.asm["ptx"])), len(signature)),
        threads=int(built.metadata.num_warps) * 32,
        shared_bytes=int(built.metadata.shared),
    )


def _stripped(ptx: str) -> str:
    """Remove the lines about source files: they hold this machine's paths, which would make equal builds differ."""
    code = ptx.split("\t.section\t.debug_", 1)[0]
    lines = (line.split("//")[0].rstrip() for line in code.splitlines())
    kept = (line for line in lines if line and not line.lstrip().startswith((".loc", ".file")))
    return "\n".join(kept) + "\n"


def _without_scratch(ptx: str, count: int) -> str:
    """Remove the parameters after the first `count`: Triton 3.9 adds two pointers to scratch memory.

    These kernels use no scratch memory, and their launcher (TensorRT, for a QDP kernel) does not pass the pointers.
    """
    names = sorted(set(re.findall(r"\w+_param_\d+", ptx)), key=lambda name: int(name.rsplit("_", 1)[1]))
    for name in names[count:]:
        if len(re.findall(rf"\b{name}\b", ptx)) != 1:
            raise BuildError(
                f"a kernel uses {name}, scratch memory that its launcher does not provide",
                hint="use Triton 3.9",
            )
        ptx = re.sub(rf",\n[^\n]*\b{name}\b", "", ptx)
    return ptx
