"""Runs a stage with OpenVINO: an IR file that a build has made from the stage's ONNX graph.

The types that are written in the graph are kept: fp32 islands of a bf16 graph stay fp32. By default OpenVINO computes
everything in bf16 where the CPU can.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.cores import default_threads
from ditc.runtime.cpu_features import BF16, cpu_features, int8_products_saturate, multiplies_bf16_faster
from ditc.runtime.errors import SessionError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.session import Array, ComputeDevice, Session, Tensor, closed, numpy_dtype, to_numpy
from ditc.runtime.sessions.compiled_shapes import CompiledShapes, Shapes, most_forms
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.openvino_attention import widen_attention
from ditc.runtime.sessions.openvino_library import TYPES, core, load_openvino
from ditc.runtime.sessions.registry import BackendRow
from ditc.runtime.sessions.shapes import check_feeds
from ditc.runtime.spec import DType, Precision, StageSpec, TensorSpec
from ditc.runtime.weight_map import LORA_DOWN, LORA_UP

CPU = "CPU"
OPEN = -1  # in the place of a size that stays open in a compiled model
# With int8-dynamic, OpenVINO gives every token one scale per so many channels. Of 32, 64, 128 and 256, 128 was the
# fastest (docs/calibration.md). It computes layers with fewer channels in fp32 (2026.4).
DYNAMIC_GROUP = 128


def weights_path(model: Path) -> Path:
    """The file beside an IR file that holds the values of its constants."""
    return model.with_suffix(".bin")


class Compiled:
    """The stage compiled for one device, and its requests. A request serves one thread at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._idle: deque[Any] = deque()
        outputs = {port.get_any_name(): port.get_partial_shape() for port in model.outputs}
        # The shapes of the outputs that are known before a run.
        self.shapes = {name: tuple(s.to_shape()) for name, s in outputs.items() if s.is_static}

    @contextmanager
    def request(self) -> Iterator[Any]:
        """A request that no other thread uses. There are as many as threads have run at the same time."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.model.create_infer_request()
        yield request
        self._idle.append(request)  # not after an error: what such a request holds is not known


class OpenvinoSession:
    """One stage in OpenVINO.

    Args:
        model: the .xml file, with its weights beside it.
        spec: the spec of the stage. The model must have the same inputs and outputs.
        device: OpenVINO's name of the device: CPU, GPU (Intel's) or NPU.
        threads: the number of CPU threads; 0 takes one per core that this process may use.
        precision: the precision of the artifact.
        changed: other values of some of the graph's initializers, by name; bf16 values as uint16 arrays of their bits.

    Raises:
        SessionError: the machine has no such device, or OpenVINO cannot read the model, or it does not fit the spec.
        MissingExtra: OpenVINO is not installed.
    """

    def __init__(
        self,
        model: Path,
        spec: StageSpec,
        *,
        device: str = CPU,
        threads: int = 0,
        precision: Precision = Precision.FP32,
        changed: Mapping[str, Array] | None = None,
    ) -> None:
        self._openvino = load_openvino()
        self.spec = spec
        _check_device(spec, device)
        bf16 = device != CPU or bool(BF16.intersection(cpu_features()))
        self.device = ComputeDevice(
            kind="cpu" if device == CPU else "other", name=f"OpenVINO on the {device}", native_16_bits=bf16
        )
        self._name, self._settings = device, settings(device, threads, precision)
        self._open = {size for size, r in spec.profile.items() if r.varies and device == CPU}
        self._compiles_ahead = (threads or default_threads()) > 1
        weights = weights_path(model)
        try:
            self._model = core().read_model(str(model), str(weights))
        except Exception as e:  # its bindings raise RuntimeError, and other classes for some files
            raise SessionError(
                f"{spec.name}: OpenVINO {self._openvino.__version__} cannot read {model.name}: {reason(e)}",
                hint='if it is too old: pip install --upgrade "ditc[openvino]"; else build the bundle again',
            ) from e
        self._optional = self._optional_inputs()
        self._check_model()
        if changed:
            self._replace_constants(changed)
        if device == CPU and not multiplies_bf16_faster():
            widen_attention(self._model)
        self._compiled = CompiledShapes(self._compile, most_forms(weights.stat().st_size))
        self._last: Compiled | None = None
        self._lock = threading.Lock()
        self._closed = False

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the stage once on arrays of the host.

        Raises:
            SessionError: the session is closed, an input does not fit the spec, or OpenVINO fails.
        """
        given = {name: np.ascontiguousarray(to_numpy(feed)) for name, feed in feeds.items()}
        loras = {name: given.pop(name, None) for name in self._optional}
        check_feeds(self.spec, given)
        shapes = {name: feed.shape for name, feed in given.items()}
        with self._lock:
            if self._closed:
                raise closed(self.spec)
            compiled = self._last = self._compiled.find(self._to_compile(shapes))
        try:
            with compiled.request() as request:
                for tensor in self.spec.inputs:
                    request.set_tensor(tensor.name, self._shared(given[tensor.name], tensor.dtype))
                for name, (dtype, empty) in self._optional.items():
                    matrix = loras[name]
                    request.set_tensor(name, self._shared(empty if matrix is None else matrix, dtype))
                outputs = {}
                for tensor in self.spec.outputs:
                    if (shape := compiled.shapes.get(tensor.name)) is not None:
                        outputs[tensor.name] = array = np.empty(shape, numpy_dtype(tensor.dtype))
                        request.set_tensor(tensor.name, self._shared(array, tensor.dtype))
                request.infer(share_outputs=True)  # its results are read below
                # Where a shape was not known, the result is in the request's own memory, which its next run writes to.
                return {
                    t.name: outputs[t.name]
                    if t.name in outputs
                    else _copied(request.get_tensor(t.name), t.dtype)
                    for t in self.spec.outputs
                }
        except RuntimeError as e:
            sizes = {name: feed.shape for name, feed in given.items()}
            raise SessionError(
                f"{self.spec.name}: {reason(e)}; the inputs were {sizes}",
                hint="if memory ran out, draw fewer or smaller pictures; else check the bundle with ditc verify --run",
            ) from e

    @property
    def optional_inputs(self) -> dict[str, np.dtype[np.generic]]:
        """The element types of the inputs for LoRAs, by name; for bf16 that of its bits."""
        return {name: empty.dtype for name, (_, empty) in self._optional.items()}

    def compile_ahead(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Begin to compile for these shapes of the inputs, in a thread; see `CompilingSession`."""
        wanted = self._to_compile(shapes)

        def prepare() -> None:
            with self._lock, suppress(SessionError):  # the run meets the same error
                if not self._closed:
                    self._compiled.prepare(wanted)

        if self._compiles_ahead and self._compiled.lacks(wanted):
            threading.Thread(target=prepare, name=f"compile {self.spec.name}").start()

    def close(self) -> None:
        """Release the model and all that was compiled. Threads that are running finish their run."""
        with self._lock:
            self._closed = True
            self._compiled.clear()
            self._model = self._last = None

    def last_compiled(self) -> Any:
        """OpenVINO's compiled model of the last run."""
        with self._lock:
            if self._last is None:
                raise closed(self.spec)
            return self._last.model

    def _to_compile(self, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
        """The shapes to compile for. On a CPU, sizes that differ from text to text stay open.

        Only what depends on them is then slower: a step by 1 % with 64 tokens, and by 4 % with all 300 (1152 channels,
        4 layers, 512 px, INT8; 2 cores of an AMD EPYC, OpenVINO 2026.4.1).
        """
        return tuple(
            tuple(
                OPEN if name in self._open else size
                for name, size in zip(tensor.shape, shapes[tensor.name], strict=True)
            )
            for tensor in self.spec.inputs
        )

    def _compile(self, shapes: Shapes | None) -> Compiled:
        model = self._model
        try:
            if shapes is not None:
                model = model.clone()  # its constants stay where they are
                wanted = zip(self.spec.inputs, shapes, strict=True)
                model.reshape({tensor.name: self._bounds(tensor, sizes) for tensor, sizes in wanted})
            return Compiled(core().compile_model(model, self._name, self._settings))
        except RuntimeError as e:
            raise SessionError(
                f"{self.spec.name}: OpenVINO cannot compile the stage for the {self._name}: {reason(e)}",
                hint="run the ONNX Runtime artifact: --backend onnxruntime",
            ) from e

    def _bounds(self, tensor: TensorSpec, sizes: tuple[int, ...]) -> list[int | tuple[int, int]]:
        """The sizes, with the smallest and largest values of those that stay open."""
        ranges = (self.spec.profile.get(str(name)) for name in tensor.shape)
        return [
            (r.min, r.max) if size == OPEN and r is not None else size
            for size, r in zip(sizes, ranges, strict=True)
        ]

    def _shared(self, array: Array, dtype: DType) -> Any:
        """The array as a tensor without a copy, also an input that cannot be written to: OpenVINO only reads those.

        The tensor does not keep the array alive: every run sets all tensors of its request first.
        """
        return self._openvino.Tensor(array, list(array.shape), getattr(self._openvino.Type, TYPES[dtype]))

    def _replace_constants(self, changed: Mapping[str, Array]) -> None:
        """Put other values in the place of constants, which have the names of the graph's initializers."""
        constants = {
            op.get_friendly_name(): op for op in self._model.get_ops() if op.get_type_name() == "Constant"
        }
        for name, array in changed.items():
            old = constants.get(name)
            if old is None or list(old.get_output_shape(0)) != list(array.shape):
                raise SessionError(
                    f"{self.spec.name}: the model has no constant {name} of shape {array.shape}",
                    hint="build the bundle again",
                )
            kind = old.get_output_element_type(0)
            tensor = self._openvino.Tensor(array, list(array.shape), kind)
            new = self._openvino.op.Constant(tensor, shared_memory=True)
            new.set_friendly_name(name)
            self._openvino.utils.replace_node(old, new)
        self._kept = dict(changed)  # the constants use their memory

    def _optional_inputs(self) -> dict[str, tuple[DType, Array]]:
        """For each input that may be left out, its type and its values then: a matrix of rank 0, whose product is 0."""
        kinds = {kind: dtype for dtype, kind in TYPES.items()}
        found = {}
        for port in self._model.inputs:
            name, sizes = port.get_any_name(), list(port.get_partial_shape())
            if name.endswith((LORA_DOWN, LORA_UP)) and len(sizes) == 2:
                dtype = kinds[port.get_element_type().get_type_name()]
                shape = [0 if size.is_dynamic else size.get_length() for size in sizes]
                found[name] = (dtype, np.zeros(shape, numpy_dtype(dtype)))
        return found

    def _check_model(self) -> None:
        def names(ports: Any) -> list[str]:
            return sorted({port.get_any_name() for port in ports} - self._optional.keys())

        promised = (sorted(i.name for i in self.spec.inputs), sorted(o.name for o in self.spec.outputs))
        found = (names(self._model.inputs), names(self._model.outputs))
        if promised != found:
            raise SessionError(
                f"{self.spec.name}: the model takes {found[0]} and gives {found[1]}, "
                f"but the manifest promises {promised[0]} and {promised[1]}",
                hint="the bundle is inconsistent: build it again",
            )


def takes_loras(options: LoadOptions) -> bool:
    """Whether its sessions take LoRAs as inputs: they do on a CPU. On other devices such graphs were never executed."""
    return options.device.upper() in ("", CPU)


def executed_types(session: OpenvinoSession) -> dict[str, list[str]]:
    """The type in which OpenVINO computes each layer that it executes, by kind of layer: {"Softmax": ["f32"], ...}.

    The layers are those of the shapes that ran last, after all of OpenVINO's fusions.
    """
    types: dict[str, list[str]] = defaultdict(list)
    for layer in session.last_compiled().get_runtime_model().get_ordered_ops():
        facts = layer.get_rt_info()
        types[facts["layerType"].astype(str)].append(facts["runtimePrecision"].astype(str))
    return types


def settings(device: str, threads: int, precision: Precision = Precision.FP32) -> dict[str, Any]:
    """OpenVINO's properties for a device and the precision of an artifact."""
    # ACCURACY keeps the types of the graph. One stream, so that all threads work on one run: a step cannot be split.
    common: dict[str, Any] = {"EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "LATENCY"}
    # By default, the hints decide whether activations are quantized where weights are in 8 bits.
    common["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = DYNAMIC_GROUP if precision is Precision.INT8_DYNAMIC else 0
    if device != CPU:
        return common
    if int8_products_saturate():
        # OpenVINO 2026.4 has no other INT8 kernels for such CPUs, and its INT8 GEMMs are no faster there than those in
        # fp32 (docs/calibration.md). Without its low-precision transformations it rounds the inputs of the products to
        # 8 bits as the graph says, and multiplies in fp32.
        common["LP_TRANSFORMS_MODE"] = False
    # Pinning would bind threads to cores outside of the process's mask, and several processes to the same cores.
    return {
        **common,
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads or default_threads(),
        "ENABLE_CPU_PINNING": False,
    }


def open_stage(
    row: BackendRow, model: Path, artifact: Artifact, options: LoadOptions, device: Device | None
) -> Session:
    """Open a session on the device that the options name, by default the CPU.

    Raises:
        SessionError: there is no such device, or the stage cannot be loaded.
    """
    return OpenvinoSession(
        model,
        artifact.spec,
        device=options.device.upper() or CPU,
        threads=options.threads,
        precision=artifact.precision,
    )


def open_changed(
    row: BackendRow,
    model: Path,
    artifact: Artifact,
    options: LoadOptions,
    device: Device | None,
    weights: Mapping[str, Array],
) -> Session:
    """Open a session with other values of some initializers of the stage's graph.

    Raises:
        SessionError: as `open_stage`.
    """
    return OpenvinoSession(
        model,
        artifact.spec,
        device=options.device.upper() or CPU,
        threads=options.threads,
        precision=artifact.precision,
        changed=weights,
    )


def reason(error: Exception) -> str:
    """The line of OpenVINO's error that says what is wrong. The lines before it name places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (said or lines or [type(error).__name__])[-1]


def _check_device(spec: StageSpec, device: str) -> None:
    found = core().available_devices
    if device not in {name.split(".")[0] for name in found}:
        raise SessionError(
            f"{spec.name}: OpenVINO finds no {device} on this machine, only {', '.join(found) or 'nothing'}",
            hint="run it on the CPU: leave out --device"
            if CPU in found
            else "install the package again: pip install --force-reinstall openvino; or run with --backend onnxruntime",
        )


def _copied(tensor: Any, dtype: DType) -> Array:
    """The values in memory of their own. OpenVINO shows bf16 as numpy's fp16; it is a uint16 array of its bits."""
    data = tensor.data.view(np.uint16) if dtype is DType.BFLOAT16 else tensor.data
    return np.array(data)
