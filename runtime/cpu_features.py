"""Which instructions of this machine's CPU decide how fast a precision is. Results of benchmarks name them."""

from __future__ import annotations

import platform
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
# Any of these adds four products of an unsigned and a signed byte without saturation.
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
INTEL = "GenuineIntel"


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


def int8_products_saturate() -> bool:
    """Whether the common u8 x s8 kernels give wrong sums on this CPU: x86 without VNNI.

    They add pairs of products in 16 bits there (vpmaddubsw), and a pair may be as large as 2 * 255 * 127 = 64,770.
    Where the CPU's instructions are not known, VNNI is taken to be missing: a slow product is better than a wrong one.
    """
    return platform.machine().lower() in ("x86_64", "amd64") and not VNNI.intersection(cpu_features())


@cache
def multiplies_bf16_faster(cpuinfo: Path = CPUINFO) -> bool:
    """Whether products of bf16 numbers are faster than those of fp32 numbers on this CPU.

    On a Xeon with avx512_bf16 and without amx_bf16, attention's products reach 150 GFLOP/s in bf16 and 200 in fp32 (two
    cores, OpenVINO 2026.4.1). On an AMD EPYC (Zen 5), bf16 GEMMs are 1.6 to 1.9 times as fast as fp32 ones.
    """
    features = cpu_features(cpuinfo)
    if "amx_bf16" in features:
        return True
    return bool(BF16.intersection(features)) and f"vendor_id\t: {INTEL}" not in cpuinfo.read_text(
        encoding="utf-8", errors="replace"
    )
