"""A GPU for tests: the CUDA calls of sessions/cuda.py over host memory, and engines that ONNX Runtime computes.

Every call is recorded. The fake is stricter than a GPU. These are errors: using a freed or unknown address, a copy past
the end of an allocation, an output that overlaps an input, an unaligned tensor, an allocation during a capture. New
memory is filled with NaN. Work in the stream is done as late as possible, which is when somebody waits for it.
"""

from __future__ import annotations

import ctypes
import gc
import math
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ditc.runtime.errors import SessionError
from ditc.runtime.session import numpy_dtype
from ditc.runtime.sessions.buffers import size_of
from ditc.runtime.sessions.device import ALIGNMENT
from ditc.runtime.sessions.engine import Binding, Shape, ShapeRange
from ditc.runtime.sessions.onnxruntime_weights import replace_weights
from ditc.runtime.spec import DType, StageSpec

POISON = 0xFF  # NaN as fp32, fp16 and bf16; -1 as an integer


@dataclass
class FakeCuda:
    """One device with `total_bytes` of memory. `calls` has the names of all calls, oldest first."""

    total_bytes: int = 1 << 34
    dlpack_device: tuple[int, int] = (
        1,
        0,
    )  # DLPack's number for the host, so that numpy and torch can read the memory
    calls: list[str] = field(default_factory=list)
    blocks: dict[int, tuple[Any, int]] = field(default_factory=dict)
    streams: set[int] = field(default_factory=lambda: {0})  # stream 0, CUDA's default, always exists
    waiting: list[Callable[[], Any]] = field(default_factory=list)
    recording: list[Callable[[], Any]] | None = None
    refuse_capture: bool = False
    lock: Any = field(default_factory=threading.RLock)  # as CUDA, whose calls any thread may make

    def allocate(self, size_bytes: int) -> int:
        self._note("allocate")
        assert self.recording is None, "allocation while capturing"
        if self.used() + size_bytes > self.total_bytes:
            raise SessionError(f"out of GPU memory: {size_bytes} bytes more are needed")
        raw = (ctypes.c_char * (size_bytes + ALIGNMENT))()
        pointer = -(-ctypes.addressof(raw) // ALIGNMENT) * ALIGNMENT
        ctypes.memset(pointer, POISON, size_bytes)
        with self.lock:
            self.blocks[pointer] = (raw, size_bytes)
        return pointer

    def free(self, pointer: int) -> None:
        self._note("free")
        with self.lock:
            self._finish()  # as cudaFree does
            del self.blocks[pointer]

    def memory(self) -> tuple[int, int]:
        return self.total_bytes - self.used(), self.total_bytes

    def used(self) -> int:
        with self.lock:
            return sum(size for _, size in self.blocks.values())

    def create_stream(self) -> int:
        self._note("create_stream")
        self.streams.add(7)
        return 7

    def destroy_stream(self, stream: int) -> None:
        self._note("destroy_stream", stream)
        self.streams.remove(stream)

    def synchronize(self, stream: int) -> None:
        self._note("synchronize", stream)
        assert self.recording is None, "waiting ends a capture"
        self._finish()

    def upload(self, pointer: int, source: np.ndarray, stream: int) -> None:
        self._note("upload", stream)
        assert self.recording is None, "a captured upload would read the same host bytes for ever"
        assert source.flags.c_contiguous
        self.check(pointer, source.nbytes)
        size_bytes, kept = source.nbytes, weakref.ref(source)

        def read() -> None:
            array = kept()
            assert array is not None, "the host bytes are gone before they were read"
            ctypes.memmove(pointer, array.ctypes.data, size_bytes)

        self.do(read)

    def download(self, target: np.ndarray, pointer: int, stream: int) -> None:
        self._note("download", stream)
        self.check(pointer, target.nbytes)
        self.do(lambda: ctypes.memmove(target.ctypes.data, pointer, target.nbytes))

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        self._note("copy", stream)
        self.check(target, size_bytes)
        self.check(source, size_bytes)
        self.do(lambda: ctypes.memmove(target, source, size_bytes))

    def begin_capture(self, stream: int) -> None:
        self._note("begin_capture", stream)
        self.recording = []

    def end_capture(self, stream: int) -> Any:
        self._note("end_capture", stream)
        recorded, self.recording = self.recording, None
        if self.refuse_capture:
            raise SessionError(
                "cudaStreamEndCapture: operation failed due to a previous error (cudaError 901)"
            )
        return recorded

    def launch(self, graph: Any, stream: int) -> None:
        self._note("launch", stream)
        for work in graph:
            self.do(work)

    def destroy_graph(self, graph: Any) -> None:
        self._note("destroy_graph")

    def do(self, work: Callable[[], Any]) -> None:
        """Put work into the stream, to be done later, or into the graph that is being captured."""
        if self.recording is None:
            with self.lock:
                self.waiting.append(work)
            return
        assert not gc.isenabled(), "a finaliser could free memory or wait in the middle of a capture"
        self.recording.append(work)

    def check(self, pointer: int, size_bytes: int) -> None:
        """Assert that the range is inside one allocation that has not been freed."""
        with self.lock:
            inside = any(
                base <= pointer and pointer + size_bytes <= base + size
                for base, (_, size) in self.blocks.items()
            )
        assert inside, f"{size_bytes} bytes at {pointer:#x} are not allocated"

    def _finish(self) -> None:
        with self.lock:
            waiting, self.waiting = self.waiting, []
            for work in waiting:
                work()

    def _note(self, name: str, stream: int = 0) -> None:
        assert stream in self.streams, f"{name} in a stream that was destroyed"
        self.calls.append(name)


@dataclass
class FakeEngine:
    """A stage's ONNX file behind the interface of an engine.

    Attributes:
        ranges: for each profile, the ranges of named dimensions that differ from those of the spec.
        scale: pixels per latent cell, for stages whose outputs have dimensions of their own.
        workspace: bytes of workspace, to which the fake adds some for larger shapes.
        fail: let every run fail.
        refuse_address: the tensor whose address is refused.
    """

    cuda: FakeCuda
    model: Path
    spec: StageSpec
    ranges: tuple[Mapping[str, Any], ...] = ({},)
    scale: int = 1
    workspace: int = 4096
    closed: bool = False
    fail: bool = False
    refuse_address: str = ""
    streamed: bool = False
    can_capture: bool = True

    def __post_init__(self) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(self.model), options, providers=["CPUExecutionProvider"])

    @property
    def bindings(self) -> tuple[Binding, ...]:
        return (
            *(Binding(t.name, t.dtype, True) for t in self.spec.inputs),
            *(Binding(t.name, t.dtype, False) for t in self.spec.outputs),
        )

    @property
    def profiles(self) -> tuple[Mapping[str, ShapeRange], ...]:
        return tuple(
            {t.name: ShapeRange(self._shape(t, r, "min"), self._shape(t, r, "max")) for t in self.spec.inputs}
            for r in self.ranges
        )

    def context(self, profile: int, stream: int) -> FakeContext:
        return FakeContext(self)

    def refit(self, weights: Mapping[str, np.ndarray]) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        opened_from = replace_weights(options, self.model, weights)
        self.session = ort.InferenceSession(opened_from, options, providers=["CPUExecutionProvider"])

    def last_error(self) -> str:
        return "the fake was told to fail" if self.fail else "no message"

    def close(self) -> None:
        self.closed = True

    def _shape(self, tensor: Any, ranges: Mapping[str, Any], end: str) -> Shape:
        named = {**self.spec.profile, **ranges}
        return tuple(d if isinstance(d, int) else getattr(named[d], end) for d in tensor.shape)


class FakeContext:
    """An execution context. It computes with the addresses that it was given, when the stream does the work."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.cuda = engine, engine.cuda
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.workspace = (0, 0)
        self.changed = (
            True  # whether shapes or workspace have changed since the last enqueue outside of a capture
        )
        # The shapes of the last enqueue, because TensorRT keeps data that depends on them.
        self.state: dict[str, Shape] = {}

    def set_shape(self, name: str, shape: Shape) -> bool:
        self.changed |= self.shapes.get(name) != tuple(shape)
        self.shapes[name] = tuple(shape)
        return True

    def shape(self, name: str) -> Shape:
        spec, sizes = self.engine.spec, {}
        for tensor in spec.inputs:
            for dim, size in zip(tensor.shape, self.shapes.get(tensor.name, ()), strict=False):
                sizes[dim] = size
        tensor = next(t for t in (*spec.outputs, *spec.inputs) if t.name == name)
        return tuple(
            d if isinstance(d, int) else sizes[d] if d in sizes else self._derived(d, sizes)
            for d in tensor.shape
        )

    def _derived(self, dim: str, sizes: Mapping[Any, int]) -> int:
        """A side of a picture from the number of latent cells and the VAE's scale, or the other way round."""
        pixels = {"image_height": "height", "image_width": "width"}
        if dim in pixels:
            return sizes[pixels[dim]] * self.engine.scale
        return sizes[next(side for side, cells in pixels.items() if cells == dim)] // self.engine.scale

    def set_address(self, name: str, pointer: int) -> None:
        assert pointer % ALIGNMENT == 0, f"{name} is not aligned"
        if name == self.engine.refuse_address:
            raise SessionError(f"the engine refuses {name}")
        self.addresses[name] = pointer

    def workspace_bytes(self) -> int:
        """The bytes of workspace, which grow with the inputs as in TensorRT."""
        return self.engine.workspace + 4 * sum(map(math.prod, self.shapes.values()))

    def set_workspace(self, pointer: int, size_bytes: int) -> None:
        self.changed |= self.workspace != (pointer, size_bytes)
        self.workspace = (pointer, size_bytes)

    def capturable(self, stream: int) -> bool:
        return self.engine.can_capture

    def enqueue(self, stream: int) -> bool:
        if self.engine.fail:
            return False
        assert self.cuda.recording is None or not self.changed, (
            "captured before a plain run with these shapes"
        )
        self.changed = False
        self.state = dict(self.shapes)
        assert self.workspace[1] >= self.workspace_bytes()
        spec = self.engine.spec
        inputs = [self._range(t.name, t.dtype) for t in spec.inputs]
        outputs = [self._range(t.name, t.dtype) for t in spec.outputs]
        for one, other in product([*inputs, *outputs], outputs):
            if one is not other:
                assert one[1] + one[2] <= other[1] or other[1] + other[2] <= one[1], (
                    f"{one[0]} aliases {other[0]}"
                )
        workspace = self.workspace
        if self.cuda.recording is None:
            self.cuda.do(lambda: self._compute(inputs, outputs, workspace))
            return True
        captured_with = self.state

        def replay() -> None:
            assert self.state == captured_with, "a graph is replayed after its context ran other shapes"
            self._compute(inputs, outputs, workspace)

        self.cuda.do(replay)
        return True

    def _range(self, name: str, dtype: DType) -> tuple[str, int, int, Shape, DType]:
        shape = self.shape(name)
        size = size_of(shape, dtype)
        self.cuda.check(self.addresses[name], size)
        return name, self.addresses[name], size, shape, dtype

    def _compute(self, inputs: list[Any], outputs: list[Any], workspace: tuple[int, int]) -> None:
        self.cuda.check(*workspace)
        feeds = {name: _view(*rest).copy() for name, *rest in inputs}
        ctypes.memset(workspace[0], POISON, workspace[1])
        names = [name for name, *_ in outputs]
        for (_, *rest), value in zip(outputs, self.engine.session.run(names, feeds), strict=True):
            _view(*rest)[...] = value


def _view(pointer: int, size: int, shape: Shape, dtype: DType) -> np.ndarray:
    raw = (ctypes.c_char * size).from_address(pointer)
    return np.frombuffer(raw, numpy_dtype(dtype), math.prod(shape)).reshape(shape)
