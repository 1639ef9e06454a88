"""The memory of a process that measures itself."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_bytes() -> int | None:
    """The largest resident size of this process so far; None where the system does not say.

    From Linux's /proc. What getrusage says there also counts the process that started this one (getrusage(2): "the
    resource usage metrics are preserved across an execve(2)").
    """
    try:
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
