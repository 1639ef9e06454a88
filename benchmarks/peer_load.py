"""How much of the machine other programs use while something is measured. Linux only: elsewhere it is not known."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter

STAT = Path("/proc/stat")
# A measurement during which others use more than this many cores is not counted.
MOST_CORES = 0.15


class OtherLoad:
    """Measures from its making on.

    Args:
        own: ids of the processes that are measured. This process is one of them.
    """

    def __init__(self, own: Iterable[int]) -> None:
        self._own = (*own, os.getpid())
        self._begun, self._before = perf_counter(), self._others_s()

    def cores(self) -> float | None:
        """How many cores all other processes have used on average; None where it is not known."""
        now = self._others_s()
        if now is None or self._before is None:
            return None
        return max(0.0, now - self._before) / (perf_counter() - self._begun)

    def _others_s(self) -> float | None:
        if not STAT.exists():
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal: proc_stat(5). Stolen time is used by other machines.
        user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text().split(maxsplit=9)[1:9])
        own = sum(map(_ticks, self._own))
        return float(user + nice + system + irq + softirq + steal - own) / os.sysconf("SC_CLK_TCK")


def _ticks(process: int) -> int:
    """The time that the process has computed, in clock ticks; 0 if it has ended."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(after_name[11]) + int(after_name[12])  # utime and stime: proc_pid_stat(5)
