"""How many CPU cores this process may use: its affinity mask, and the CPU quota of its control groups.

Libraries count the machine's cores instead. ONNX Runtime even binds its threads to them, outside of the mask too; it
does not when it is told a number of threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

MEMBERSHIP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")


def allowed_cpus() -> frozenset[int]:
    """The numbers of the CPUs that this process may run on. A container's cpuset is part of the mask."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))  # macOS and Windows, where a mask is rare


def cpu_quota(membership: Path = MEMBERSHIP, groups: Path = GROUPS) -> float | None:
    """The CPUs' worth of time that the control groups (version 1 or 2) allow; None if they set no limit.

    Args:
        membership: the list of the groups that this process is in.
        groups: where the groups' folders are mounted.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            quotas += _quotas_2(groups, path)
        elif "cpu" in controllers.split(","):
            for mount in (groups / controllers, groups / "cpu"):
                quotas += _quotas_1(mount, path)
    return min(quotas, default=None)


def default_threads() -> int:
    """The number of threads for a library that computes: one per physical core that this process may use."""
    quota = cpu_quota()
    cores = _physical_cores(allowed_cpus())
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def most_threads() -> int:
    """More threads than this only wait for each other: all CPUs of the mask, or the quota, rounded up."""
    quota = cpu_quota()
    cpus = len(allowed_cpus())
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def limit_openmp(environment: MutableMapping[str, str] = os.environ) -> None:
    """Pass a quota on to libraries that are imported later: torch and NumPy follow the mask, but know no quota."""
    quota = cpu_quota()
    if quota is not None and quota < len(allowed_cpus()):
        environment.setdefault("OMP_NUM_THREADS", str(default_threads()))


def _quotas_2(mount: Path, path: str) -> Iterator[float]:
    """The limits of a group and those around it: "max 100000" or "150000 100000", in microseconds."""
    for folder in _upwards(mount, path):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            if quota != "max":
                yield int(quota) / int(period)


def _quotas_1(mount: Path, path: str) -> Iterator[float]:
    """The same in version 1, where -1 means no limit."""
    for folder in _upwards(mount, path):
        with suppress(OSError, ValueError):
            quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
            if quota > 0:
                yield quota / int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The group's folder and its parents. In a container, the path may be the host's, and only the mount exists."""
    parts = PurePosixPath(path.lstrip("/"))
    return (mount / folder for folder in (parts, *parts.parents))


def _physical_cores(cpus: Collection[int]) -> int:
    """The number of cores that these CPUs belong to. Two threads of one core share its arithmetic units."""
    try:
        siblings = [
            (TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii")
            for cpu in cpus
        ]
    except OSError:
        return len(cpus)
    return len(set(siblings))
