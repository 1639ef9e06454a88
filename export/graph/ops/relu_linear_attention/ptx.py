"""The op's kernels compiled ahead of time to PTX: needs Triton, and no GPU.

PTX for one compute capability runs on every later one: the driver finishes the compilation (CUDA programming guide,
"Just-in-Time Compilation"), so a file for sm80 serves sm86, sm89, sm90 and sm120 too.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from ditc.runtime.errors import BuildError, MissingExtra
from ditc.runtime.spec import DType

# Tokens a program takes at once, and warps: chosen for 32-wide heads (64 x 32 16-bit tiles of q, k, v in registers
# without spilling); not tuned, for no GPU was at hand.
BLOCK_N = 64
WARPS = 4
# The oldest generation with 16-bit tensor cores for bf16; sm75 is not served.
TARGET_SM = 80

_TYPES = {DType.FLOAT32: "fp32", DType.FLOAT16: "fp16", DType.BFLOAT16: "bf16"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled kernel. shared_bytes: dynamic shared memory a block; threads: of a block."""

    name: str
    ptx: str
    threads: int
    shared_bytes: int


def block_d(head_dim: int) -> int:
    """The head dimension, rounded up to what tl.dot takes: a power of 2, 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def compile_pair(dtype: DType, head_dim: int, sm: int = TARGET_SM) -> tuple[Kernel, Kernel]:
    """kv_kernel and out_kernel. Raises MissingExtra without Triton."""
    kernels = load_kernels()
    sizes = {"D": head_dim, "BLOCK_N": BLOCK_N, "BLOCK_D": block_d(head_dim)}
    x, f, i = "*" + _TYPES[dtype], "*fp32", "i32"
    kv = {"k": x, "v": x, "kv": f, "total": f, "N": i, "H": i, "share": i}
    out = {"q": x, "kv": f, "total": f, "out": x, "N": i, "H": i, "S": i, "eps": "fp32"}
    return _compile(kernels.kv_kernel, kv, sizes, sm), _compile(kernels.out_kernel, out, sizes, sm)


@cache
def compile_fused(dtype: DType, head_dim: int, eps: float, sm: int = TARGET_SM) -> Kernel:
    """fused_kernel, with eps built in: a TensorRT QDP kernel takes integers only. Raises MissingExtra."""
    sizes = {"EPS": eps, "D": head_dim, "BLOCK_N": BLOCK_N, "BLOCK_D": block_d(head_dim)}
    x, i = "*" + _TYPES[dtype], "i32"
    return _compile(
        load_kernels().fused_kernel, {"q": x, "k": x, "v": x, "N": i, "H": i, "out": x}, sizes, sm
    )


def pair_as_json(dtype: DType, head_dim: int, sm: int = TARGET_SM) -> str:
    """What the plugin carries with it into the engine; `runtime.plugins` reads it."""
    kv, out = compile_pair(dtype, head_dim, sm)
    sizes = {"block_n": BLOCK_N, "block_d": block_d(head_dim), "head_dim": head_dim}
    return json.dumps({"dtype": dtype.value, **sizes, "kv": asdict(kv), "out": asdict(out)}, sort_keys=True)


def load_kernels() -> Any:
    """The module of the Triton kernels. Raises MissingExtra."""
    try:
        from ditc.export.graph.ops.relu_linear_attention import kernels
    except ImportError as e:
        raise MissingExtra("triton", "plugin") from e
    return kernels


def _compile(kernel: Any, signature: dict[str, str], constants: dict[str, Any], sm: int) -> Kernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        # Tensors begin at multiples of 256 (sessions/device.py): lets the compiler load 16 bytes at once.
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, kind in enumerate(signature.values())
            if kind.startswith("*")
        },
    )
    # Fused multiply-add: the default of Triton 3.9, said aloud because 3.10 changes it.
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return Kernel(
        name=str(built.metadata.name),
        ptx=_without_scratch(_stripped(str(built.asm["ptx"])), len(signature)),
        threads=int(built.metadata.num_warps) * 32,
        shared_bytes=int(built.metadata.shared),
    )


def _stripped(ptx: str) -> str:
    """Without lines about source files: they hold this machine's paths, and equal builds would differ."""
    code = ptx.split("\t.section\t.debug_", 1)[0]
    lines = (line.split("//")[0].rstrip() for line in code.splitlines())
    kept = (line for line in lines if line and not line.lstrip().startswith((".loc", ".file")))
    return "\n".join(kept) + "\n"


def _without_scratch(ptx: str, count: int) -> str:
    """Without the parameters behind the first `count`: Triton (3.9) adds two pointers to scratch memory.

    These kernels use none, and whoever launches them (TensorRT, for a QDP kernel) does not know of them.
    """
    names = sorted(set(re.findall(r"\w+_param_\d+", ptx)), key=lambda name: int(name.rsplit("_", 1)[1]))
    for name in names[count:]:
        if len(re.findall(rf"\b{name}\b", ptx)) != 1:
            raise BuildError(
                f"a kernel uses {name}, scratch memory that nobody provides", hint="use Triton 3.9"
            )
        ptx = re.sub(rf",\n[^\n]*\b{name}\b", "", ptx)
    return ptx
