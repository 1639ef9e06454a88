"""Device memory as sessions use it: pools of equal buffers, and tensors that hold one."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np

from ditc.runtime.session import Array, numpy_dtype
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.dlpack import to_capsule
from ditc.runtime.spec import DType


def size_of(shape: tuple[int, ...], dtype: DType) -> int:
    """Bytes of a contiguous tensor."""
    return math.prod(shape) * numpy_dtype(dtype).itemsize


class Lease:
    """A buffer out of a pool; it goes back when the last tensor that holds it is gone."""

    __slots__ = ("__weakref__", "pointer")

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer


class Pool:
    """Buffers of one size, made when all others are in use: two serve a loop that feeds a result back."""

    def __init__(self, device: Device, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._device = device
        self._idle: list[int] = []
        self._closed = False

    def take(self) -> Lease:
        """A buffer that nobody holds; its content is undefined."""
        pointer = self._idle.pop() if self._idle else self._device.allocate(self.size_bytes)
        lease = Lease(pointer)
        weakref.finalize(lease, self._give_back, pointer).atexit = False
        return lease

    def close(self) -> None:
        """Free what is idle now, and the rest as it comes back."""
        self._closed = True
        while self._idle:
            self._device.free(self._idle.pop(), self.size_bytes)

    def _give_back(self, pointer: int) -> None:
        if self._closed:
            self._device.free(pointer, self.size_bytes)
        else:
            self._idle.append(pointer)


class DeviceArray:
    """A tensor on the device: a value, never written again while anybody holds it.

    Args:
        pitch: bytes from one first index to the next where rows are padded, else 0.
    """

    def __init__(
        self,
        device: Device,
        lease: Lease,
        shape: tuple[int, ...],
        dtype: DType,
        *,
        offset: int = 0,
        pitch: int = 0,
    ) -> None:
        self.device = device
        self.shape = shape
        self.dtype = dtype
        self.pointer = lease.pointer + offset
        self.pitch = pitch
        self._lease, self._offset = lease, offset

    @property
    def size_bytes(self) -> int:
        return size_of(self.shape, self.dtype)

    def numpy(self) -> Array:
        """A copy on the host; waits for the work that makes the tensor."""
        kind = numpy_dtype(self.dtype)
        rows = (self.shape[0], self.pitch // kind.itemsize) if self.pitch else self.shape
        host = np.empty(rows, kind)
        with self.device.lock:
            self.device.cuda.download(host, self.pointer, self.device.stream)
            self.device.synchronize()
        if self.pitch:
            host = host[:, : math.prod(self.shape[1:])].reshape(self.shape)
        return host

    def sample(self, index: int) -> DeviceArray:
        """The part (1, ...) of one first index, in the same memory."""
        step = self.pitch or size_of(self.shape[1:], self.dtype)
        offset = self._offset + index * step
        return DeviceArray(self.device, self._lease, (1, *self.shape[1:]), self.dtype, offset=offset)

    def samples(self) -> list[DeviceArray]:
        """All of them, in order."""
        return [self.sample(index) for index in range(self.shape[0])]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device.cuda.dlpack_device

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        """A capsule of this memory, finished: the stream is waited for, whatever stream the consumer has."""
        if self.pitch:
            raise BufferError("rows of this tensor are padded: take one with sample(), or numpy()")
        with self.device.lock:
            self.device.synchronize()
        return to_capsule(self, self.pointer, self.shape, self.dtype, self.__dlpack_device__())
