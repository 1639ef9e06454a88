"""One GPU as sessions share it: a stream, one workspace for activations, and the memory they took."""

from __future__ import annotations

import threading

import numpy as np

from ditc.runtime.session import Array
from ditc.runtime.sessions.cuda import Cuda, CudaRuntime

# TensorRT wants the workspace at multiples of 256 (IExecutionContext::setDeviceMemory); cudaMalloc gives them. ditc
# keeps the same for every tensor that it hands to an engine.
ALIGNMENT = 256


def aligned(size_bytes: int) -> int:
    """The size, rounded up so that what follows is aligned."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class Device:
    """A device, its stream, and the workspace that all contexts use one after the other.

    Work of all sessions is put into one stream under one lock, so a buffer that is given back may be used again at
    once: what reads it comes before what writes it. The last session that leaves closes the device.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.lock = threading.RLock()
        self.stream = cuda.create_stream()
        self.allocated_bytes = 0
        self.workspace = (0, 0)  # pointer, size
        self._uploads: list[Array] = []
        self._users = 0
        self._used_before = self._used()
        self.peak_bytes = 0

    def enter(self) -> None:
        """A session begins to use the device."""
        self._users += 1

    def leave(self) -> None:
        """A session has ended; after the last, stream and workspace are freed.

        Tensors may outlive it: they are read and freed through CUDA's own stream 0.
        """
        self._users -= 1
        if self._users == 0:
            self.trim()
            self.synchronize()
            self.cuda.destroy_stream(self.stream)
            self.stream = 0

    def allocate(self, size_bytes: int) -> int:
        """Memory that `free` gives back. Raises SessionError when there is none."""
        pointer = self.cuda.allocate(max(size_bytes, ALIGNMENT))
        self.allocated_bytes += size_bytes
        self.measure()
        return pointer

    def free(self, pointer: int, size_bytes: int) -> None:
        """Give memory back; work that uses it may still be in the stream (cudaFree waits for it)."""
        self.cuda.free(pointer)
        self.allocated_bytes -= size_bytes

    def reserve(self, size_bytes: int) -> tuple[int, int]:
        """The workspace, at least so large. When it grows it moves: graphs that hold its address are void."""
        if self.workspace[1] < size_bytes:
            self.trim()
            self.workspace = (self.allocate(size_bytes), size_bytes)
        return self.workspace

    def trim(self) -> None:
        """Free the workspace; the next run that needs one reserves it again."""
        pointer, size_bytes = self.workspace
        if pointer:
            self.synchronize()
            self.workspace = (0, 0)
            self.free(pointer, size_bytes)

    def upload(self, pointer: int, source: Array) -> None:
        """Copy from the host, in the stream's order. The caller may change or drop the array at once.

        CUDA only says that such a copy from pageable memory "might be synchronous" (API synchronization behavior), so
        the bytes are kept until the stream is waited for: a copy of them, unless nobody can write them.
        """
        fixed = source.flags.c_contiguous and not source.flags.writeable
        kept = source if fixed else np.array(source, order="C")
        self._uploads.append(kept)
        self.cuda.upload(pointer, kept, self.stream)

    def synchronize(self) -> None:
        """Wait for everything in the stream."""
        self.cuda.synchronize(self.stream)
        self._uploads.clear()

    def measure(self) -> int:
        """Bytes in use on the whole GPU since this device was opened, by ditc and its libraries; keeps the peak."""
        used = self._used() - self._used_before
        self.peak_bytes = max(self.peak_bytes, used)
        return used

    def _used(self) -> int:
        free, total = self.cuda.memory()
        return total - free


def open_device() -> Device:
    """This machine's first GPU, for the engines of one bundle to share. Raises SessionError, MissingExtra."""
    return Device(CudaRuntime())
