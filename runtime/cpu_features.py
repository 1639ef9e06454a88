"""Which instructions of this machine's CPU decide how fast a precision is. Results of benchmarks name them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

# The names are those of Linux. x86: vectors of 256 and 512 bits, INT8 dot products, products in bf16 and fp16, and
# Intel's matrix unit. Arm: dot products, and products in bf16.
TELLING = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "bf16",
)
# Any of these computes products of bf16 numbers.
BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@cache
def cpu_features(cpuinfo: Path = CPUINFO) -> tuple[str, ...]:
    """The names in TELLING that the CPU has, in that order; () where Linux does not list them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    found = set(line.partition(":")[2].split())
    return tuple(name for name in TELLING if name in found)
