"""What the CPU's features say about the precision that is fast on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditc.runtime.cpu_features import cpu_features, multiplies_bf16_faster


@pytest.mark.parametrize(
    ("vendor", "flags", "faster"),
    [
        ("GenuineIntel", "avx2 avx512f avx512_bf16 amx_bf16", True),
        ("GenuineIntel", "avx2 avx512f avx512_bf16", False),
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
    ],
)
def test_bf16_is_faster_where_the_cpu_has_a_fast_product_of_it(
    tmp_path: Path, vendor: str, flags: str, faster: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n", encoding="utf-8")
    assert multiplies_bf16_faster(cpuinfo) is faster
    assert list(cpu_features(cpuinfo)) == [name for name in flags.split() if name != "fpu"]


def test_nothing_is_known_of_a_cpu_that_is_not_listed(tmp_path: Path) -> None:
    assert not multiplies_bf16_faster(tmp_path / "absent")
