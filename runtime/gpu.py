"""The GPU of this machine, asked of its driver's own tool, and whether an engine fits it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.errors import SessionError
from ditc.runtime.spec import Backend

# The parser of TensorRT-RTX opens this name once it meets a plugin; the wheel of 1.7.1 ships NAME.1 alone.
RTX_LIBRARY = "libtensorrt_rtx.so"
# tensorrt_rtx.ComputeCapability of 1.7.1. It has no sm90 and no sm100, and says of an engine there: "TensorRT-RTX does
# not support this compute capability, so the engine cannot be rebuilt for it".
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
NO_GPU = "no NVIDIA GPU with a driver (nvidia-smi finds none)"
PACKAGES = {Backend.TENSORRT_RTX: "tensorrt-rtx", Backend.TENSORRT: "tensorrt"}


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


def library_version(backend: Backend) -> str | None:
    """Version of the library that runs a backend's engines, None if it is not installed."""
    try:
        return version(PACKAGES[backend])
    except (KeyError, PackageNotFoundError):
        return None


def check_engine(artifact: Artifact, *, gpu: Gpu | None, library: str | None) -> None:
    """Refuse an engine that was built for another GPU or with another library, before its file is opened.

    Neither library loads an engine of another version (TensorRT docs: version compatibility is a build option, which
    ditc does not set; TensorRT-RTX 1.7.1 cannot set it).

    Raises:
        SessionError: no library or GPU, another version, or a GPU that is not among the targets.
    """
    stage, backend = artifact.spec.name, artifact.backend.value
    rebuild = f"build it here: ditc build CHECKPOINT -o BUNDLE --backend {backend}"
    if library is None:
        raise SessionError(
            f"{stage}: {backend} is not installed, so its engine cannot run",
            hint=f'pip install "ditc[{"rtx" if artifact.backend is Backend.TENSORRT_RTX else "tensorrt"}]"',
        )
    if artifact.library is not None and artifact.library != library:
        raise SessionError(
            f"{stage}: the engine was built with {backend} {artifact.library}, this machine has {library}",
            hint=f"install {PACKAGES[artifact.backend]}=={artifact.library}, or {rebuild}",
        )
    if gpu is None:
        raise SessionError(
            f"{stage}: this machine has no NVIDIA GPU to run a {backend} engine",
            hint="run the ONNX Runtime artifact: --backend onnxruntime",
        )
    if artifact.backend is Backend.TENSORRT_RTX and gpu.sm not in artifact.targets:
        other = f"TensorRT-RTX has none for {gpu.sm}: build here with --backend tensorrt, or run --backend onnxruntime"
        raise SessionError(
            f"{stage}: the engine is for {', '.join(artifact.targets)}, this GPU ({gpu.name}) is {gpu.sm}",
            hint=f"{rebuild} --targets {gpu.sm}" if gpu.sm in RTX_TARGETS else other,
        )
    if artifact.gpu is not None and artifact.targets == ("this-gpu",) and artifact.gpu != gpu.name:
        raise SessionError(
            f"{stage}: the engine was built on and for {artifact.gpu}, this GPU is {gpu.name}", hint=rebuild
        )


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
