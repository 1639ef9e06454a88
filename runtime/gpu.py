"""This machine's GPUs, as CUDA sees and numbers them, and the one that this process uses: CUDA's first."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ditc.runtime.cuda_driver import VISIBLE, CudaAnswer, CudaGpu, ask
from ditc.runtime.errors import SessionError, UsageError

# When TensorRT-RTX's parser meets a plugin, it opens a library of this name. The wheel of 1.7.1 has only NAME.1.
RTX_LIBRARY = "libtensorrt_rtx.so"
PCI, NVIDIA = Path("/sys/bus/pci/devices"), "0x10de"
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
LIST = "ditc doctor lists the GPUs with their numbers and UUIDs"

_selected = ""  # what select_gpu was given; CUDA cannot be told another choice in the same process


@dataclass(frozen=True, slots=True)
class Gpu:
    """Name and compute capability ("sm89") of a GPU."""

    name: str
    sm: str


@cache
def cuda() -> CudaAnswer:
    """What CUDA says about this machine. It is asked once per process."""
    return ask()


def find_gpus() -> tuple[CudaGpu, ...]:
    """The GPUs that CUDA sees, in its order."""
    return cuda().gpus


def find_gpu() -> Gpu | None:
    """The GPU that this process uses: CUDA's first. None without a GPU or driver, or if all GPUs are hidden."""
    gpus = find_gpus()
    return Gpu(gpus[0].name, gpus[0].sm) if gpus else None


def no_gpu() -> str:
    """Why `find_gpu` finds none, in one line."""
    return f"no NVIDIA GPU with a driver ({cuda().lack})"


def may_have_gpu() -> bool:
    """Whether an NVIDIA GPU is in this machine, with or without a driver. True where nobody can tell.

    Only Linux on x86 can tell: its GPUs are PCI devices, also as a container sees them that no GPU was given to.
    """
    if platform.machine() != "x86_64" or not PCI.is_dir():
        return True
    with suppress(OSError):
        return any((device / "vendor").read_text().strip() == NVIDIA for device in PCI.iterdir())
    return True


def select_gpu(device: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let this process see only one GPU, which all libraries then use. Call it before anything else uses CUDA.

    Args:
        device: CUDA's number of the GPU, or its UUID or the beginning of that. "" changes nothing.

    Raises:
        UsageError: there is no such GPU.
        SessionError: CUDA has already started in this process, on another GPU.
    """
    global _selected
    if device in ("", _selected):
        return
    started = cuda.cache_info().currsize > 0
    if not started:
        environment[VISIBLE] = _entry(device, environment.get(VISIBLE))
    gpus = find_gpus()
    if not gpus:
        raise UsageError(f"there is no GPU {device} here: {cuda().lack}", hint=LIST)
    if device.isdecimal():  # what it counts has changed once GPUs are hidden
        right = not _selected and (device == "0" if started else len(gpus) == 1)
    else:
        right = gpus[0].uuid.lower().startswith(device.lower())
    if not right:
        raise SessionError(
            f"CUDA has already started in this process, and its first GPU is {gpus[0].name} ({gpus[0].uuid})",
            hint=f"name the GPU when the first bundle is loaded, or set {VISIBLE} before the program starts",
        )
    _selected = _selected or device


def check_device(device: str) -> None:
    """Raise UsageError if this can be neither a GPU's number nor its UUID."""
    if not re.fullmatch(r"|[0-9]{1,4}|(GPU|MIG)-[0-9a-fA-F-]+", device):
        raise UsageError(f"device {device!r} is neither a number nor a UUID of a GPU", hint=LIST)


def driver_version() -> str:
    """The version of the NVIDIA driver, or of CUDA in it, if it does not say its own; "" without a GPU."""
    return _driver_version() if find_gpus() else ""


@cache
def _driver_version() -> str:
    # "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build ..."
    if KERNEL_MODULE.is_file() and (
        found := re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", KERNEL_MODULE.read_text(errors="replace"))
    ):
        return found[0]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]  # Windows and WSL
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return f"CUDA {cuda().version}"
    return done.stdout.partition("\n")[0].strip()


def _entry(device: str, visible: str | None) -> str:
    """The GPU as CUDA_VISIBLE_DEVICES names it. The variable's present entries are what numbers count."""
    if visible is None or not device.isdecimal():
        return device
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    if int(device) >= len(entries):
        raise UsageError(f"there is no GPU {device} here, with {VISIBLE}={visible!r}", hint=LIST)
    return entries[int(device)]


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
