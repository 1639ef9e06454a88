"""Peak memory of this process while a native library works."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL_S = 0.02

# Peak of a TensorRT-RTX 1.7.1 build over what was resident before, chains of 2048x2048 MatMuls, one process each:
# 64 MiB 0.455 GB, 256 MiB 0.863 (fp32) and 0.871 (fp16), 1 GiB 2.53: 0.32 GB + 2.06 times the weights.
FIXED_BYTES = 350_000_000
# Full size took more: 2.6 times the weights for Gemma-2-2b, SD3.5-medium and Sana 0.6B, 2.0 for SANA-1.5 4.8B.
BYTES_PER_WEIGHT_BYTE = 2.7


def estimate_build_bytes(graph_bytes: int) -> int:
    """About how much memory a build takes for a graph with that many bytes of weights."""
    return FIXED_BYTES + round(BYTES_PER_WEIGHT_BYTE * graph_bytes)


class PeakMemory:
    """Samples the process's resident memory on a thread; `peak_bytes` is the largest sample.

    It counts the whole process: what was resident before the block is in it. `peak_anonymous_bytes` leaves out pages of
    mapped files, a checkpoint's weights above all, which the system drops and reads again when memory is short.
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
        anonymous = memory.rss - getattr(memory, "shared", 0)  # psutil has it on Linux only
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous)
