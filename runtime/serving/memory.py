"""How much memory there is, and how much of it is taken."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import UsageError
from ditc.runtime.gpu import find_gpus, select_gpu
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose_here
from ditc.runtime.sessions.registry import row_of
from ditc.runtime.spec import DENOISER

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
# What is left for the pictures in work, the texts that are kept, and the rest of the machine.
_SHARE = 0.8
# Where the kernel says how much memory the process's group may use: cgroup v2 and v1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def parse_bytes(text: str) -> int:
    """A number of bytes, such as 800M, 12GB or 8GiB.

    Raises:
        UsageError: it is not one.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?", text.strip())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"{text!r:.40} is not a number of bytes", hint="write it as 800M, 12GB or 8GiB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def default_budget(gpu_bytes: int | None) -> int | None:
    """The memory that models may take together. None if the machine does not say how much it has.

    Args:
        gpu_bytes: the memory of the GPU that runs the models; None without one.
    """
    if gpu_bytes is not None:
        return int(_SHARE * gpu_bytes)
    known = [size for size in (_machine_bytes(), *map(_limit, _LIMITS)) if size is not None]
    return int(_SHARE * min(known)) if known else None


def gpu_bytes(bundles: Mapping[str, Path], load: LoadOptions) -> int | None:
    """The memory of the GPU on which these bundles would run here; None if they run on the CPU.

    Raises:
        DitcError: a bundle cannot run here.
    """
    select_gpu(load.gpu)
    on_gpu = False
    for path in bundles.values():
        artifacts, _ = choose_here(path, load_manifest(path), load)
        on_gpu |= row_of(artifacts[DENOISER].backend).same_gpu
    return find_gpus()[0].memory_bytes if on_gpu else None


def resident_bytes() -> int:
    """The memory that this process takes; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _machine_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _limit(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # it is missing, or "max"
        return None
