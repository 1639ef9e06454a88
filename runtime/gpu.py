"""This machine's GPU, as nvidia-smi reports it, and the folder of TensorRT-RTX's libraries."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# When TensorRT-RTX's parser meets a plugin, it opens a library of this name. The wheel of 1.7.1 has only NAME.1.
RTX_LIBRARY = "libtensorrt_rtx.so"
NO_GPU = "no NVIDIA GPU with a driver (nvidia-smi finds none)"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Name and compute capability ("sm89") of the first GPU."""

    name: str
    sm: str


@cache
def find_gpu() -> Gpu | None:
    """The first GPU that CUDA sees. None without a GPU or driver, or if CUDA_VISIBLE_DEVICES hides all GPUs.

    If a machine has different GPUs, CUDA and nvidia-smi number them alike only with CUDA_DEVICE_ORDER=PCI_BUS_ID. UUIDs
    in CUDA_VISIBLE_DEVICES are safe (CUDA programming guide, "CUDA Environment Variables").
    """
    name, _, capability = _nvidia_smi("name,compute_cap").rpartition(",")
    return Gpu(name.strip(), "sm" + capability.strip().replace(".", "")) if name else None


@cache
def driver_version() -> str:
    """The version of the NVIDIA driver; "" without a driver or a GPU."""
    return _nvidia_smi("driver_version")


def _nvidia_smi(fields: str) -> str:
    """nvidia-smi's answer about the first visible GPU, one line; "" if there is none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first in ("", "-1"):
        return ""
    if not first.startswith("MIG-"):  # --id takes GPUs, but not the MIG instances that a GPU is divided into
        command.append(f"--id={first}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def rtx_library_folder() -> Path | None:
    """The folder of the libraries in TensorRT-RTX's wheel; None if it is not installed."""
    for name in ("tensorrt_rtx_cu13_libs", "tensorrt_rtx_libs"):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        for file in files:
            if file.name == f"{RTX_LIBRARY}.1":
                return Path(str(file.locate())).parent
    return None
