"""The machine on which a result was measured: enough to tell machines apart, but no names of people or hosts."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ditc.runtime.gpu import driver_version, find_gpus
from ditc.runtime.sessions.registry import rows

PACKAGES = ("ditc", "numpy", "onnx", "torch", "diffusers", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Processor, operating system and GPUs. Machines with the same parts give equal values."""

    processor: str
    cpus: int
    system: str
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join((f"{self.processor} ({self.cpus} CPUs)", self.system, *self.gpus))


def this_machine() -> Machine:
    """The machine that this process runs on, with the GPUs that CUDA sees."""
    return Machine(
        processor=_processor(),
        cpus=os.cpu_count() or 0,
        system=f"{platform.system()} {platform.machine()}",
        gpus=_gpus(),
    )


def library_versions() -> dict[str, str]:
    """Versions of the installed packages that affect results, including the libraries of the backends."""
    found = {}
    for name in (*PACKAGES, *(package for row in rows() for package in row.packages)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> tuple[str, ...]:
    return tuple(f"{gpu.name}, {driver_version()}" for gpu in find_gpus())
