"""All CUDA calls of ditc, each in a line or two over cuda-python.

Pointers and streams are integers. The tests use a class with the same methods over host memory.
"""

from __future__ import annotations

from typing import Any, Protocol

from ditc.runtime.errors import MissingExtra, SessionError
from ditc.runtime.session import Array

# DLPack's numbers for kinds of devices (dlpack.h): kDLCPU and kDLCUDA.
DLPACK_CPU, DLPACK_CUDA = 1, 2


class Cuda(Protocol):
    """One device. Copies are ordered by the stream, and asynchronous if CUDA can do that with the host's memory."""

    @property
    def dlpack_device(self) -> tuple[int, int]: ...

    def allocate(self, size_bytes: int) -> int: ...
    def free(self, pointer: int) -> None: ...
    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        ...

    def create_stream(self) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def synchronize(self, stream: int) -> None: ...

    def upload(self, pointer: int, source: Array, stream: int) -> None:
        """Copy a contiguous array to the device. The array must not change before `synchronize` has returned."""
        ...

    def download(self, target: Array, pointer: int, stream: int) -> None: ...
    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None: ...

    def begin_capture(self, stream: int) -> None: ...
    def end_capture(self, stream: int) -> Any:
        """The captured work as a graph to launch. Raises SessionError if some of the work cannot be captured."""
        ...

    def launch(self, graph: Any, stream: int) -> None: ...
    def destroy_graph(self, graph: Any) -> None: ...


class CudaRuntime:
    """A GPU, through cuda.bindings.runtime. That package contains CUDA's runtime; the machine must have the driver.

    Raises:
        MissingExtra: cuda-python is not installed.
        SessionError: there is no GPU, or no driver that this version of CUDA can use.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as e:
            raise MissingExtra("cuda-python", "rtx") from e
        self._cuda = runtime
        self._device = device
        self._call(runtime.cudaSetDevice(device), "cudaSetDevice")

    @property
    def dlpack_device(self) -> tuple[int, int]:
        return DLPACK_CUDA, self._device

    def allocate(self, size_bytes: int) -> int:
        error, pointer = self._cuda.cudaMalloc(size_bytes)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            free, total = self.memory()
            raise SessionError(
                f"out of GPU memory: {size_bytes / 1e9:.2f} GB more are needed, but {free / 1e9:.2f} of "
                f"{total / 1e9:.1f} GB are free",
                hint="run with --low-vram, or draw fewer or smaller pictures",
            )
        self._call((error,), "cudaMalloc")
        return int(pointer)

    def free(self, pointer: int) -> None:
        self._call(self._cuda.cudaFree(pointer), "cudaFree")

    def memory(self) -> tuple[int, int]:
        free, total = self._call(self._cuda.cudaMemGetInfo(), "cudaMemGetInfo")
        return int(free), int(total)

    def create_stream(self) -> int:
        # Non-blocking: the stream does not wait for the legacy default stream, which other libraries use.
        flags = self._cuda.cudaStreamNonBlocking
        (stream,) = self._call(self._cuda.cudaStreamCreateWithFlags(flags), "cudaStreamCreateWithFlags")
        return int(stream)

    def destroy_stream(self, stream: int) -> None:
        self._call(self._cuda.cudaStreamDestroy(stream), "cudaStreamDestroy")

    def synchronize(self, stream: int) -> None:
        self._call(self._cuda.cudaStreamSynchronize(stream), "cudaStreamSynchronize")

    def upload(self, pointer: int, source: Array, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(pointer, source.ctypes.data, source.nbytes, kind, stream)

    def download(self, target: Array, pointer: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(target.ctypes.data, pointer, target.nbytes, kind, stream)

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._copy(target, source, size_bytes, kind, stream)

    def begin_capture(self, stream: int) -> None:
        # In this mode other threads may allocate memory during the capture. This thread must not.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture(stream, mode), "cudaStreamBeginCapture")

    def end_capture(self, stream: int) -> Any:
        (graph,) = self._call(self._cuda.cudaStreamEndCapture(stream), "cudaStreamEndCapture")
        try:
            (executable,) = self._call(self._cuda.cudaGraphInstantiate(graph, 0), "cudaGraphInstantiate")
        finally:
            self._cuda.cudaGraphDestroy(graph)
        return executable

    def launch(self, graph: Any, stream: int) -> None:
        self._call(self._cuda.cudaGraphLaunch(graph, stream), "cudaGraphLaunch")

    def destroy_graph(self, graph: Any) -> None:
        self._call(self._cuda.cudaGraphExecDestroy(graph), "cudaGraphExecDestroy")

    def _copy(self, target: int, source: int, size_bytes: int, kind: Any, stream: int) -> None:
        self._call(self._cuda.cudaMemcpyAsync(target, source, size_bytes, kind, stream), "cudaMemcpyAsync")

    def _call(self, answer: tuple[Any, ...], name: str) -> tuple[Any, ...]:
        error, *values = answer
        if error != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(error)
            raise SessionError(
                f"{name}: {text.decode()} (cudaError {int(error)})",
                hint="run ditc doctor to check the GPU and its driver",
            )
        return tuple(values)
