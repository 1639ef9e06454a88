"""ONNX Runtime with its tensors on the device: results stay there, constant inputs are sent once, shapes are captured.

The second GPU backend, for GPUs and stages that no engine serves. IO binding works on the CPU's memory too, which is
how it is tested; ONNX Runtime's CUDA provider itself was never run by us.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditc.runtime.errors import SessionError
from ditc.runtime.session import Array, Tensor, samples, to_numpy
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession, first_line
from ditc.runtime.sessions.onnxruntime_cuda import CUDA, INSTALL, cuda_lack
from ditc.runtime.spec import DType, Precision, StageSpec

log = logging.getLogger(__name__)

# Shapes that are captured; further ones run without a graph. Each holds its inputs and outputs.
MAX_GRAPHS = 4
# ONNX Runtime's run option: -1 neither captures nor replays (CUDA execution provider, "Using CUDA Graphs").
NO_GRAPH = "-1"
BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


class OrtTensor:
    """A value of ONNX Runtime, where it is; never written again while anybody holds it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.shape = tuple(value.shape())

    def numpy(self) -> Array:
        """A copy on the host; bf16 as its uint16 bits, for which ONNX Runtime knows no NumPy type."""
        if self.value.element_type() == BFLOAT16:
            bits = np.empty(self.shape, np.uint16)
            _bf16_bits(bits).update_inplace(self.value)
            return bits
        return np.array(self.value.numpy())

    def samples(self) -> list[Tensor]:
        """On the host: ONNX Runtime cannot take a part of a value where it is."""
        return samples(self.numpy())

    def __dlpack_device__(self) -> tuple[int, int]:
        return tuple(self.value.__dlpack_device__())

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        return self.value.__dlpack__(stream=stream)


@dataclass
class _Graph:
    """Buffers of one set of shapes, whose addresses the graph holds. held: the value that was last copied in."""

    number: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    binding: Any
    held: dict[str, Any]


class OnnxRuntimeDeviceSession(OnnxRuntimeSession):
    """One stage, bound to buffers on a device.

    Args:
        device: "cuda", or "cpu" for the CPU provider.
        graphs: replay a captured CUDA graph for each set of shapes, from its second run on.
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
    ) -> None:
        super().__init__(
            model,
            spec,
            precision=precision,
            provider=CUDA if device == "cuda" else CPU,
            threads=threads,
            cuda_graph=graphs and device == "cuda",
        )
        self._device, self._use_graphs = device, graphs
        self._bf16 = {tensor.name for tensor in spec.inputs if tensor.dtype is DType.BFLOAT16}
        self._sent: dict[str, tuple[weakref.ref[Array], Any]] = {}
        # Shape and ONNX element type of each output, by the shapes of the inputs.
        self._seen: dict[Any, dict[str, tuple[tuple[int, ...], int]]] = {}
        self._graphs: dict[Any, _Graph] = {}

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Execute the stage once; the results are on the device."""
        key = tuple(sorted((name, tuple(feed.shape)) for name, feed in feeds.items()))
        try:
            if self._use_graphs and key in self._seen:
                graph = self._graphs.get(key)
                if graph is None and len(self._graphs) < MAX_GRAPHS:
                    graph = self._graphs[key] = self._bound(feeds, self._seen[key])
                if graph is not None:
                    return self._replay(graph, feeds)
            results = self._plain(feeds)
        except SessionError:
            raise
        except Exception as e:  # onnxruntime raises classes of its C API that share no base but Exception
            shapes = {name: tuple(feed.shape) for name, feed in feeds.items()}
            raise SessionError(f"{self.spec.name}: {first_line(e)}; fed {shapes}") from e
        self._seen[key] = {name: (t.shape, t.value.element_type()) for name, t in results.items()}
        return dict(results)

    def close(self) -> None:
        """Release graphs, buffers and the session."""
        self._graphs.clear()
        self._sent.clear()
        super().close()

    def _plain(self, feeds: Mapping[str, Tensor]) -> dict[str, OrtTensor]:
        binding = self._session.io_binding()
        values = {name: self._value(name, feed) for name, feed in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)
        self._run(binding, NO_GRAPH)
        return {n: OrtTensor(v) for n, v in zip(self._outputs, binding.get_outputs(), strict=True)}

    def _run(self, binding: Any, graph: str) -> None:
        # Copies from device to device go through CUDA's default stream and may be under way; the provider's own stream
        # does not wait for that one. The run itself waits for its end.
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding, _options(graph))

    def _value(self, name: str, feed: Tensor) -> Any:
        """The feed on the device; an array that nobody can change is sent once."""
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

    def _bound(
        self, feeds: Mapping[str, Tensor], outputs: Mapping[str, tuple[tuple[int, ...], int]]
    ) -> _Graph:
        """Buffers that stay where they are, for a graph of these shapes."""
        binding = self._session.io_binding()
        fixed = {name: _copy(self._value(name, feed), self._device) for name, feed in feeds.items()}
        made = {name: _empty(shape, kind, self._device) for name, (shape, kind) in outputs.items()}
        for name, value in fixed.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in made.items():
            binding.bind_ortvalue_output(name, value)
        return _Graph(str(len(self._graphs) + 1), fixed, made, binding, {})

    def _replay(self, graph: _Graph, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, feed in feeds.items():
            value = self._value(name, feed)
            if graph.held.get(name) is not value:  # a value that was sent once is there already
                graph.inputs[name].update_inplace(value)
                graph.held[name] = value
        self._run(graph.binding, graph.number)
        return {name: OrtTensor(_copy(value, self._device)) for name, value in graph.outputs.items()}


def open_bound(
    model: Path, spec: StageSpec, *, precision: Precision, graphs: bool, device: str = "cuda"
) -> OnnxRuntimeDeviceSession:
    """A session on the first GPU; with graphs where the provider takes every node, as it must to capture.

    Raises:
        SessionError: the CUDA provider cannot run here, or cannot load the file.
    """
    if device == "cuda" and (lack := cuda_lack()):
        raise SessionError(f"{spec.name}: {lack}", hint=f"{INSTALL}, or --provider cpu")
    if graphs:
        try:
            return OnnxRuntimeDeviceSession(model, spec, precision=precision, device=device, graphs=True)
        except SessionError as e:
            log.info("%s: no CUDA graph in ONNX Runtime: %s", spec.name, e)
    return OnnxRuntimeDeviceSession(model, spec, precision=precision, device=device)


def _options(graph: str) -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options


def _empty(shape: tuple[int, ...], kind: int, device: str) -> Any:
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, device, 0)


def _bf16_bits(bits: Array) -> Any:
    """A bf16 value over the memory of its bits; uint16, which is what the array says, no session would take."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)


def _copy(value: Any, device: str) -> Any:
    made = _empty(tuple(value.shape()), value.element_type(), device)
    made.update_inplace(value)
    return made
