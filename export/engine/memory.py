"""Measure the peak memory of this process while a native library works, and estimate it for an engine's build."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL_S = 0.02

# Peak of a TensorRT-RTX 1.7.1 build above what was resident before. Measured on chains of 2048x2048 MatMuls, one per
# process: 64 MiB of weights took 0.455 GB, 256 MiB took 0.863 (fp32) and 0.871 (fp16), 1 GiB took 2.53. That is
# 0.32 GB + 2.06 times the weights.
# Full-size models took more (benchmarks/results/build_scale-2026-11-22.json). For the six of them, from a DC-AE decoder
# to SANA-1.5 4.8B, the estimate with these numbers is 1.02 to 1.20 times the peak.
FIXED_BYTES = 700_000_000
BYTES_PER_WEIGHT_BYTE = 2.7


def estimate_build_bytes(graph_bytes: int) -> int:
    """Estimate the bytes of memory that a build takes for a graph with that many bytes of weights."""
    return FIXED_BYTES + round(BYTES_PER_WEIGHT_BYTE * graph_bytes)


class PeakMemory:
    """Samples the process's resident memory on a thread.

    Attributes:
        peak_bytes: the largest sample. It counts the whole process, with what was resident before the block.
        peak_anonymous_bytes: the same without pages of mapped files, most of them a checkpoint's weights. The system
            drops such pages when memory is short, and reads them again.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak_bytes = self.peak_anonymous_bytes = 0

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        memory = self._process.memory_info()
        self.peak_bytes = max(self.peak_bytes, memory.rss)
        anonymous = memory.rss - getattr(memory, "shared", 0)  # psutil reports it on Linux only
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous)
