"""Device memory of sessions: pools of equally large buffers, and tensors that hold one of them."""

from __future__ import annotations

import math
import weakref
from contextlib import suppress
from typing import Any

import numpy as np

from ditc.runtime.session import Array, Tensor, check_fits, numpy_dtype, to_numpy
from ditc.runtime.sessions.device import ALIGNMENT, Device
from ditc.runtime.sessions.dlpack import to_capsule
from ditc.runtime.spec import DType


def size_of(shape: tuple[int, ...], dtype: DType) -> int:
    """The bytes of a contiguous tensor."""
    return math.prod(shape) * numpy_dtype(dtype).itemsize


class Lease:
    """A buffer that was taken from a pool. It returns to the pool when the last tensor that holds it is deleted."""

    __slots__ = ("__weakref__", "pointer")

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer


class Pool:
    """Buffers of one size. A new one is made if all others are in use. A loop that feeds results back needs two.

    Buffers are taken and the pool is closed under the device's lock. They are returned without it, by whichever thread
    drops a tensor last: a finaliser that waited for a lock could stop a thread that holds another one.
    """

    def __init__(self, device: Device, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._device = device
        self._idle: list[int] = []
        self._closed = False

    @property
    def has_idle(self) -> bool:
        """Whether `take` needs no new memory."""
        return bool(self._idle)

    def take(self) -> Lease:
        """A buffer that nobody holds. Its content is undefined."""
        pointer = self._idle.pop() if self._idle else self._device.allocate(self.size_bytes)
        lease = Lease(pointer)
        weakref.finalize(lease, self._give_back, pointer).atexit = False
        return lease

    def close(self) -> None:
        """Free the idle buffers now, and the others when they are returned."""
        self._closed = True
        self._free_idle()

    def _give_back(self, pointer: int) -> None:
        self._idle.append(pointer)
        if self._closed:  # looked at last, so that a pool that is closed just now keeps nothing
            self._free_idle()

    def _free_idle(self) -> None:
        with suppress(IndexError):  # instead of asking for the length, which another thread may change
            while True:
                self._device.free(self._idle.pop())


class Pools:
    """Buffers for tensors of different sizes: of the largest one, of half of it, of a quarter, and so on.

    A tensor lies in the smallest that holds it, or in a larger one that is idle. So it takes at most twice its bytes of
    new memory: the tiles of a picture, each of which a decoder of videos keeps something of, do not take a buffer of
    the whole picture each.

    Args:
        size_bytes: of the largest tensor.
    """

    def __init__(self, device: Device, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._device = device
        self._by_size: dict[int, Pool] = {}

    def take(self, size_bytes: int) -> Lease:
        """A buffer of at least this size, that nobody holds. Its content is undefined."""
        size = self.size_bytes
        while size // 2 >= max(size_bytes, ALIGNMENT):
            size //= 2
        if size not in self._by_size:
            self._by_size[size] = Pool(self._device, size)
        best = self._by_size[size]
        if not best.has_idle:
            larger = [other for other in sorted(self._by_size) if other > size]
            best = next((self._by_size[other] for other in larger if self._by_size[other].has_idle), best)
        return best.take()

    def close(self) -> None:
        """Free the idle buffers now, and the others when they are returned."""
        for pool in self._by_size.values():
            pool.close()


class DeviceArray:
    """A tensor on the device. It is not written to while anybody holds it, except with `assign`.

    Args:
        lease: the buffer that the tensor lies in.
        offset: where the tensor begins in the buffer, in bytes.
        pitch: bytes from one entry of the first dimension to the next if the entries are padded, else 0.
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
        """A copy on the host. Waits for the work that computes the tensor."""
        kind = numpy_dtype(self.dtype)
        rows = (self.shape[0], self.pitch // kind.itemsize) if self.pitch else self.shape
        host = np.empty(rows, kind)
        with self.device.lock:
            self.device.cuda.download(host, self.pointer, self.device.stream)
            self.device.synchronize()
        if self.pitch:
            host = host[:, : math.prod(self.shape[1:])].reshape(self.shape)
        return host

    def narrow(self, start: int, stop: int) -> DeviceArray:
        """The entries from start up to stop of the first dimension, in the same memory.

        Always a new object, also for all entries: a session copies only inputs that are not the same object as before.
        """
        step = self.pitch or size_of(self.shape[1:], self.dtype)
        return DeviceArray(
            self.device,
            self._lease,
            (stop - start, *self.shape[1:]),
            self.dtype,
            offset=self._offset + start * step,
            pitch=self.pitch if stop - start > 1 else 0,
        )

    def assign(self, start: int, source: Tensor) -> None:
        """Copy the source over the entries from `start` on, after the work that is already in the stream.

        Raises:
            SessionError: the source has another element type, or entries of another shape.
        """
        pointer, device = self.pointer + start * size_of(self.shape[1:], self.dtype), self.device
        with device.lock:
            if isinstance(source, DeviceArray) and source.device is device and not source.pitch:
                check_fits(source.dtype, source.shape, self.dtype, self.shape)
                device.cuda.copy(pointer, source.pointer, source.size_bytes, device.stream)
            else:
                array = to_numpy(source)
                check_fits(array.dtype, array.shape, numpy_dtype(self.dtype), self.shape)
                device.upload(pointer, array)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device.cuda.dlpack_device

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        """A DLPack capsule of this memory. Waits until the tensor is computed, so any stream may read it."""
        if self.pitch:
            raise BufferError("the entries of this tensor are padded: take one with narrow(), or use numpy()")
        with self.device.lock:
            self.device.synchronize()
        return to_capsule(self, self.pointer, self.shape, self.dtype, self.__dlpack_device__())
