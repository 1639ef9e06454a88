"""One GPU that sessions share: a stream, one workspace for activations, and a count of the memory they use."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np

from ditc.runtime.session import Array
from ditc.runtime.sessions.cuda import Cuda, CudaRuntime

# Bytes. TensorRT needs its workspace at a multiple of 256 (IExecutionContext::setDeviceMemory), and cudaMalloc returns
# such addresses. ditc aligns every tensor that it hands to an engine in the same way.
ALIGNMENT = 256


def aligned(size_bytes: int) -> int:
    """The size, rounded up to a multiple of ALIGNMENT."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class Device:
    """A device, its stream, and the workspace that all execution contexts use one after the other.

    All sessions put their work into one stream, under one lock. Therefore a buffer that is returned to its pool can be
    used again at once: work that still reads it comes before work that writes to it. The device closes when its last
    session leaves.

    Attributes:
        peak_bytes: the largest result of `measure` so far.
        workspace: pointer and size in bytes; (0, 0) if there is none.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.lock = threading.RLock()
        self.stream = cuda.create_stream()
        self._allocated: dict[int, int] = {}  # sizes in bytes by pointer
        self.workspace = (0, 0)
        self._uploads: list[Array] = []
        self._kept: deque[object] = deque()
        self._users = 0
        self._used_before = self._used()
        self.peak_bytes = 0

    @property
    def allocated_bytes(self) -> int:
        """Memory that ditc has allocated on the device."""
        return sum(list(self._allocated.values()))

    def enter(self) -> None:
        """Count a session that begins to use the device."""
        with self.lock:
            self._users += 1

    def leave(self) -> None:
        """Count a session that has ended. After the last one, the stream and the workspace are freed.

        Tensors may live longer. They are then read and freed through CUDA's default stream, 0.
        """
        with self.lock:
            self._users -= 1
            if self._users == 0:
                self.trim()
                self.synchronize()
                self.cuda.destroy_stream(self.stream)
                self.stream = 0

    def allocate(self, size_bytes: int) -> int:
        """Allocate memory, for `free` to release. Raises SessionError if there is not enough."""
        pointer = self.cuda.allocate(max(size_bytes, ALIGNMENT))
        self._allocated[pointer] = size_bytes
        self.measure()
        return pointer

    def free(self, pointer: int) -> None:
        """Release memory. Work that uses it may still be in the stream, because cudaFree waits for that work.

        It needs no lock, so that tensors can be deleted in any thread at any time.
        """
        del self._allocated[pointer]  # first: once it is free, another thread may be given the same address
        self.cuda.free(pointer)

    def reserve(self, size_bytes: int) -> tuple[int, int]:
        """The workspace (pointer, size), with at least this size in bytes.

        If it has to grow, it moves, and CUDA graphs that contain its old address must not be used any more.
        """
        if self.workspace[1] < size_bytes:
            self.trim()
            self.workspace = (self.allocate(size_bytes), size_bytes)
        return self.workspace

    def trim(self) -> None:
        """Free the workspace. The next run that needs one reserves it again."""
        pointer, _ = self.workspace
        if pointer:
            self.synchronize()
            self.workspace = (0, 0)
            self.free(pointer)

    def upload(self, pointer: int, source: Array) -> None:
        """Copy an array to the device, in the stream's order. The caller may change or delete the array at once.

        CUDA only says that such a copy from pageable memory "might be synchronous" (API synchronization behavior).
        Therefore the bytes are kept until the stream is done: the array itself if it is not writeable, else a copy.
        """
        constant = source.flags.c_contiguous and not source.flags.writeable
        kept = source if constant else np.array(source, order="C")
        self._uploads.append(kept)
        self.cuda.upload(pointer, kept, self.stream)

    def keep_until_done(self, owner: object) -> None:
        """Keep an object until `synchronize` has waited for all work that is in the stream now.

        For finalizers. The garbage collector runs them in any thread, between any two lines: one that waited for a lock
        could wait for ever, and one that waited for the stream could end a capture. So this does neither.
        """
        if self.stream:  # otherwise the last session has left, after waiting for the stream
            self._kept.append(owner)

    def synchronize(self) -> None:
        """Wait until everything in the stream is done. The caller holds the lock."""
        kept = len(self._kept)  # those that come while this waits may belong to later work
        self.cuda.synchronize(self.stream)
        self._uploads.clear()
        for _ in range(kept):
            self._kept.popleft()

    def measure(self) -> int:
        """Bytes that are in use on the whole GPU beyond those in use when this device was opened. Updates peak_bytes.

        This includes memory that the libraries allocate by themselves, and that of other processes.
        """
        used = self._used() - self._used_before
        self.peak_bytes = max(self.peak_bytes, used)
        return used

    def _used(self) -> int:
        free, total = self.cuda.memory()
        return total - free


def open_device() -> Device:
    """Open this machine's first GPU, which the engines of one bundle share. Raises as CudaRuntime does."""
    return Device(CudaRuntime())
