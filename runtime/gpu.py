"""The GPU of this machine, asked of its driver's own tool, and where TensorRT-RTX keeps its libraries."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# The parser of TensorRT-RTX opens this name once it meets a plugin; the wheel of 1.7.1 ships NAME.1 alone.
RTX_LIBRARY = "libtensorrt_rtx.so"
NO_GPU = "no NVIDIA GPU with a driver (nvidia-smi finds none)"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Name and compute capability ("sm89") of the first GPU."""

    name: str
    sm: str


@cache
def find_gpu() -> Gpu | None:
    """CUDA's first GPU as nvidia-smi knows it; None without GPU or driver, or where CUDA_VISIBLE_DEVICES hides all.

    On a machine with different GPUs, numbers in CUDA_VISIBLE_DEVICES mean the same to both only with
    CUDA_DEVICE_ORDER=PCI_BUS_ID; UUIDs always do (CUDA programming guide, "CUDA Environment Variables").
    """
    name, _, capability = _nvidia_smi("name,compute_cap").rpartition(",")
    return Gpu(name.strip(), "sm" + capability.strip().replace(".", "")) if name else None


@cache
def driver_version() -> str:
    """Version of the NVIDIA driver, as nvidia-smi says; "" without one."""
    return _nvidia_smi("driver_version")


def _nvidia_smi(fields: str) -> str:
    """One line about the first visible GPU; "" where there is none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first in ("", "-1"):
        return ""
    if not first.startswith("MIG-"):  # a share of a GPU, which nvidia-smi lists by its GPU's number alone
        command.append(f"--id={first}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def rtx_library_folder() -> Path | None:
    """Where the wheel of TensorRT-RTX keeps its libraries; None if it is not installed."""
    for name in ("tensorrt_rtx_cu13_libs", "tensorrt_rtx_libs"):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        for file in files:
            if file.name == f"{RTX_LIBRARY}.1":
                return Path(str(file.locate())).parent
    return None
