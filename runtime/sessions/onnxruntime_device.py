"""ONNX Runtime with its tensors on the device (IO binding), for GPUs and stages that have no engine.

Results stay on the device, constant inputs are sent once, and runs of the same shapes can be replayed as a CUDA graph.
IO binding works with the CPU's memory too, and that is how this file is tested. It has not computed on a GPU yet.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditc.runtime.errors import SessionError
from ditc.runtime.session import Array, Tensor, check_fits, numpy_dtype, to_numpy
from ditc.runtime.sessions.dlpack import to_capsule
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession, first_line
from ditc.runtime.sessions.onnxruntime_cuda import CUDA, INSTALL, cuda_lack
from ditc.runtime.spec import DType, Precision, StageSpec

log = logging.getLogger(__name__)

# The number of sets of shapes that get a CUDA graph; further ones run without. A graph keeps its inputs and outputs.
MAX_GRAPHS = 4
# A value of the run option gpu_graph_id: neither capture nor replay (CUDA execution provider, "Using CUDA Graphs").
NO_GRAPH = "-1"
# The numbers of the element types in onnx.TensorProto.
ELEMENT_TYPES = {
    DType.FLOAT32: 1,
    DType.INT64: 7,
    DType.BOOL: 9,
    DType.FLOAT16: 10,
    DType.BFLOAT16: 16,
}
BFLOAT16 = ELEMENT_TYPES[DType.BFLOAT16]
# Threads take turns on the device, with all sessions and tensors: a graph has one set of buffers, ONNX Runtime captures
# it in CUDA's global mode (other threads must then not copy or allocate), and the allocator behind `OrtValue` is not
# safe for threads (microsoft/onnxruntime issue 20713).
DEVICE_LOCK = threading.RLock()


class OrtTensor:
    """A tensor that ONNX Runtime holds, on the device or the host. It is not written to while anybody holds it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.shape = tuple(value.shape())

    def numpy(self) -> Array:
        """A copy on the host. bf16 comes as uint16 bits, because NumPy has no such type."""
        with DEVICE_LOCK:
            if self.value.element_type() == BFLOAT16:
                bits = np.empty(self.shape, np.uint16)
                _bf16_bits(bits).update_inplace(self.value)
                return bits
            return np.array(self.value.numpy())

    def narrow(self, start: int, stop: int) -> OrtTensor:
        """The entries from start up to stop of the first dimension, in the same memory.

        Always a new object, also for all entries: a graph copies only inputs that are not the same object as before.
        """
        return OrtTensor(_view(self.value, start, stop - start))

    def assign(self, start: int, source: Tensor) -> None:
        """Copy the source over the entries from `start` on. Raises SessionError if its element type differs."""
        part = self.narrow(start, start + source.shape[0]).value
        if isinstance(source, OrtTensor):
            content = source.value
        else:
            array = np.ascontiguousarray(to_numpy(source))
            check_fits(array.dtype, array.shape, numpy_dtype(_dtype(self.value)), self.shape)
            content = _bf16_bits(array) if _dtype(self.value) is DType.BFLOAT16 else array
        with DEVICE_LOCK:
            part.update_inplace(content)

    def __dlpack_device__(self) -> tuple[int, int]:
        return tuple(self.value.__dlpack_device__())

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        return self.value.__dlpack__(stream=stream)


@dataclass
class _Graph:
    """A CUDA graph for one set of shapes, with the buffers whose addresses it holds.

    Attributes:
        number: the graph's id in ONNX Runtime (gpu_graph_id).
        copied: for each input, the value that was copied into its buffer last, if anybody still holds that.
    """

    number: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    binding: Any
    copied: dict[str, weakref.ref[Any]]


class OnnxRuntimeDeviceSession(OnnxRuntimeSession):
    """One stage whose inputs and outputs are bound to buffers on a device.

    Any number of threads may use it. They take turns, and a run's results belong to its caller: they are copied out of
    a graph's buffers before the next thread's turn.

    Args:
        device: "cuda", or "cpu" for the CPU provider.
        graphs: from the second run of a set of shapes on, capture and replay it as a CUDA graph.
    """

    def __init__(
        self,
        model: Path,
        spec: StageSpec,
        *,
        precision: Precision = Precision.FP32,
        device: str = "cuda",
        threads: int = 0,
        graphs: bool = False,
        weights: Mapping[str, Array] | None = None,
    ) -> None:
        super().__init__(
            model,
            spec,
            precision=precision,
            provider=CUDA if device == "cuda" else CPU,
            threads=threads,
            cuda_graph=graphs and device == "cuda",
            weights=weights,
        )
        self._device, self._use_graphs = device, graphs
        self._bf16 = {tensor.name for tensor in spec.inputs if tensor.dtype is DType.BFLOAT16}
        self._sent: dict[str, tuple[weakref.ref[Array], Any]] = {}
        # For every set of input shapes that has run: the shape and ONNX element type of each output.
        self._outputs_of: dict[Any, dict[str, tuple[tuple[int, ...], int]]] = {}
        self._graphs: dict[Any, _Graph] = {}

    @property
    def optional_inputs(self) -> dict[str, np.dtype[np.generic]]:
        """None: its buffers are those of the spec's inputs. LoRAs are added to the weights."""
        return {}

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the stage once. The results are on the device."""
        with DEVICE_LOCK:
            return self._run_alone(feeds)

    def _run_alone(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        key = tuple(sorted((name, tuple(feed.shape)) for name, feed in feeds.items()))
        self._check_open()
        try:
            if self._use_graphs and key in self._outputs_of:
                graph = self._graphs.get(key)
                if graph is None and len(self._graphs) < MAX_GRAPHS:
                    graph = self._graphs[key] = self._make_graph(feeds, self._outputs_of[key])
                if graph is not None:
                    return self._replay(graph, feeds)
            results = self._run_without_graph(feeds)
        except SessionError:
            raise
        except Exception as e:  # onnxruntime raises classes of its C API that share no base but Exception
            shapes = {name: tuple(feed.shape) for name, feed in feeds.items()}
            raise SessionError(
                f"{self.spec.name}: {first_line(e)}; the inputs were {shapes}",
                hint="if memory ran out, draw fewer or smaller pictures; else check the bundle with ditc verify --run",
            ) from e
        self._outputs_of[key] = {name: (t.shape, t.value.element_type()) for name, t in results.items()}
        return dict(results)

    def empty(self, shape: tuple[int, ...], dtype: DType) -> OrtTensor:
        """A tensor on the device with undefined content."""
        with DEVICE_LOCK:
            return OrtTensor(_empty(shape, ELEMENT_TYPES[dtype], self._device))

    def close(self) -> None:
        """Release graphs, buffers and the session."""
        with DEVICE_LOCK:
            self._graphs.clear()
            self._sent.clear()
            super().close()

    def _run_without_graph(self, feeds: Mapping[str, Tensor]) -> dict[str, OrtTensor]:
        binding = self._session.io_binding()
        values = {name: self._value(name, feed) for name, feed in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)
        self._run(binding, NO_GRAPH)
        return {n: OrtTensor(v) for n, v in zip(self._outputs, binding.get_outputs(), strict=True)}

    def _run(self, binding: Any, graph: str) -> None:
        # Copies from device to device go through CUDA's default stream, and the provider's own stream does not wait for
        # that one. The run itself returns when it is finished.
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding, _options(graph))

    def _value(self, name: str, feed: Tensor) -> Any:
        """The input on the device. An array that is not writeable is sent only once, because it cannot change."""
        import onnxruntime as ort

        if isinstance(feed, OrtTensor):
            return feed.value
        array = np.ascontiguousarray(to_numpy(feed))
        known = self._sent.get(name)
        if known is not None and known[0]() is feed:
            return known[1]
        if name in self._bf16:
            value = _empty(array.shape, BFLOAT16, self._device)
            value.update_inplace(_bf16_bits(array))
        else:
            value = ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)
        if isinstance(feed, np.ndarray) and not feed.flags.writeable:
            self._sent[name] = (weakref.ref(feed), value)
        return value

    def _make_graph(
        self, feeds: Mapping[str, Tensor], outputs: Mapping[str, tuple[tuple[int, ...], int]]
    ) -> _Graph:
        """Make the buffers for a graph of these shapes. ONNX Runtime captures the graph in its first run."""
        binding = self._session.io_binding()
        inputs = {name: _copy(self._value(name, feed), self._device) for name, feed in feeds.items()}
        results = {name: _empty(shape, kind, self._device) for name, (shape, kind) in outputs.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in results.items():
            binding.bind_ortvalue_output(name, value)
        return _Graph(str(len(self._graphs) + 1), inputs, results, binding, {})

    def _replay(self, graph: _Graph, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, feed in feeds.items():
            value = self._value(name, feed)
            if name not in graph.copied or graph.copied[name]() is not value:
                graph.inputs[name].update_inplace(value)
                graph.copied[name] = weakref.ref(value)
        self._run(graph.binding, graph.number)
        return {name: OrtTensor(_copy(value, self._device)) for name, value in graph.outputs.items()}


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a tensor's memory, for `OrtValue.from_dlpack`.

    ONNX Runtime expects bool as DLPack's uint8, and reads from the attribute `dtype` whether it is bool.
    """

    value: Any
    pointer: int
    shape: tuple[int, ...]
    dtype: DType
    device: tuple[int, int]

    def __dlpack__(self) -> Any:
        return to_capsule(self.value, self.pointer, self.shape, self.dtype, self.device, bool_as_uint8=True)


def open_on_device(
    model: Path,
    spec: StageSpec,
    *,
    precision: Precision,
    graphs: bool,
    device: str = "cuda",
    weights: Mapping[str, Array] | None = None,
) -> OnnxRuntimeDeviceSession:
    """Open a session on the first GPU.

    Args:
        weights: other values of some of the graph's initializers, by name.
        graphs: use CUDA graphs if the provider supports every node of the stage, which ONNX Runtime requires for them.

    Raises:
        SessionError: the CUDA provider cannot run here, or cannot load the file.
    """
    if device == "cuda" and (lack := cuda_lack()):
        raise SessionError(f"{spec.name}: {lack}", hint=f"{INSTALL}, or --provider cpu")
    if graphs:
        try:
            return OnnxRuntimeDeviceSession(
                model, spec, precision=precision, device=device, graphs=True, weights=weights
            )
        except SessionError as e:
            log.info("%s: no CUDA graph in ONNX Runtime: %s", spec.name, e)
    return OnnxRuntimeDeviceSession(model, spec, precision=precision, device=device, weights=weights)


def _options(graph: str) -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options


def _empty(shape: tuple[int, ...], kind: int, device: str) -> Any:
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, device, 0)


def _bf16_bits(bits: Array) -> Any:
    """A bf16 tensor over the memory of an array of its bits. Sessions would refuse the array's own type, uint16."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)


def _view(value: Any, first: int, length: int) -> Any:
    """Some entries of a tensor, in the same memory. ONNX Runtime has no slices, so this goes through DLPack."""
    import onnxruntime as ort

    shape = tuple(value.shape())
    entry_bytes = value.tensor_size_in_bytes() // max(shape[0], 1)
    device = tuple(map(int, value.__dlpack_device__()))
    pointer = value.data_ptr() + first * entry_bytes
    part = _Part(value, pointer, (length, *shape[1:]), _dtype(value), (device[0], device[1]))
    return ort.OrtValue.from_dlpack(part)


def _dtype(value: Any) -> DType:
    kind = value.element_type()
    return next(dtype for dtype, number in ELEMENT_TYPES.items() if number == kind)


def _copy(value: Any, device: str) -> Any:
    made = _empty(tuple(value.shape()), value.element_type(), device)
    made.update_inplace(value)
    return made
