"""Finding the GPU: which one nvidia-smi is asked about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ditc.runtime.gpu import Gpu, driver_version, find_gpu

# A stand-in for nvidia-smi on a machine with two GPUs. It answers --query-gpu=... --format=csv,noheader [--id=N].
TOOL = """#!/bin/sh
case "$*" in *driver_version*) line="580.95.05";; *) line="";; esac
case "$*" in
    *--id=0*|*--id=GPU-aa*) echo "${line:-NVIDIA L40S, 8.9}";;
    *--id=1*) echo "${line:-NVIDIA GeForce RTX 5090, 12.0}";;
    *--id=*) echo "No devices were found"; exit 6;;
    *) echo "${line:-NVIDIA L40S MIG, 8.9}"; echo "${line:-NVIDIA GeForce RTX 5090, 12.0}";;
esac
"""
FIRST, SECOND = Gpu("NVIDIA L40S", "sm89"), Gpu("NVIDIA GeForce RTX 5090", "sm120")


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "nvidia-smi").write_text(TOOL)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for answer in (find_gpu, driver_version):
        answer.cache_clear()
    yield
    for answer in (find_gpu, driver_version):
        answer.cache_clear()


@pytest.mark.usefixtures("tool")
@pytest.mark.parametrize(
    ("visible", "gpu"),
    [
        (None, FIRST),
        ("0", FIRST),
        ("1,0", SECOND),
        ("GPU-aa12", FIRST),
        ("MIG-4f", Gpu("NVIDIA L40S MIG", "sm89")),
        ("", None),
        ("-1", None),
        ("7", None),
    ],
)
def test_the_gpu_is_the_first_that_cuda_may_see(
    visible: str | None, gpu: Gpu | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpu() == gpu
    assert driver_version() == ("580.95.05" if gpu else "")


def test_without_the_tool_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    find_gpu.cache_clear()
    assert find_gpu() is None
    find_gpu.cache_clear()
