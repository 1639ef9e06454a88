"""The only module of the exporter that uses TensorRT's Python API. It serves both `tensorrt` 11 and `tensorrt_rtx` 1.7.

Both are strongly typed: the ONNX graph decides all precisions, and the builder has no precision flags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ditc.runtime.errors import UsageError
from ditc.runtime.sessions.tensorrt_engine import MODULES
from ditc.runtime.sessions.tensorrt_engine import load_library as runtime_library
from ditc.runtime.sessions.tensorrt_log import message_log
from ditc.runtime.spec import Backend

# Called as progress(phase, step, steps) when the builder has finished `step` of `steps` in `phase`. Phases nest.
Progress = Callable[[str, int, int], None]

# The min, opt and max shape of one input.
ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def load_library(backend: Backend) -> Any:
    """The backend's Python module.

    Raises:
        UsageError: the backend builds no engines.
        MissingExtra: its library is not installed.
    """
    if backend not in MODULES:
        raise UsageError(f"backend {backend} builds no engines", hint="use tensorrt-rtx or tensorrt")
    return runtime_library(backend)


class Compiler:
    """Compiles one network from ONNX to an engine. It owns the library's builder, network and config."""

    def __init__(self, backend: Backend, progress: Progress | None = None, *, plugins: bool = False) -> None:
        self._trt = load_library(backend)
        self.backend = backend
        self.version: str = self._trt.__version__
        self._said = message_log(self._trt)
        self._begun_at = self._said.count
        self._builder = self._trt.Builder(self._said.logger)
        # Strong typing needs no flag in TensorRT 11 and TensorRT-RTX. With plugins, a flag tells TensorRT to use their
        # compiled kernels; TensorRT-RTX has no such flag.
        flag = getattr(self._trt.NetworkDefinitionCreationFlag, "PREFER_AOT_PYTHON_PLUGINS", None)
        self._network = self._builder.create_network(1 << int(flag) if plugins and flag is not None else 0)
        self._config = self._builder.create_builder_config()
        self._monitor = _make_monitor(self._trt, progress) if progress else None
        if self._monitor:
            self._config.progress_monitor = self._monitor

    def parse(self, path: Path) -> str | None:
        """Read an ONNX file and its external data. Returns the parser's errors as text, or None if there are none."""
        parser = self._trt.OnnxParser(self._network, self._said.logger)
        if parser.parse_from_file(str(path)):
            return None
        return "; ".join(_describe(parser.get_error(index)) for index in range(parser.num_errors))

    @property
    def strongly_typed(self) -> bool:
        """Whether the library takes every type from the graph."""
        return bool(self._network.get_flag(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    @property
    def num_layers(self) -> int:
        """Layers of the parsed network, before fusion."""
        return int(self._network.num_layers)

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every input; -1 is a dynamic dimension."""
        tensors = (self._network.get_input(index) for index in range(self._network.num_inputs))
        return {tensor.name: tuple(tensor.shape) for tensor in tensors}

    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(self._network.get_output(index).name for index in range(self._network.num_outputs))

    def types(self) -> set[str]:
        """Element types in the network: "fp32", "fp16", "bf16", "fp8", "int64" and so on."""
        names = {"FLOAT": "fp32", "HALF": "fp16"}
        found = set()
        for index in range(self._network.num_layers):
            layer = self._network.get_layer(index)
            for output in range(layer.num_outputs):
                kind = layer.get_output(output).dtype.name
                found.add(names.get(kind, kind.lower()))
        return found

    def allow_tf32(self, allowed: bool) -> None:
        """Set or clear the TF32 flag, which the library sets by default."""
        (self._config.set_flag if allowed else self._config.clear_flag)(self._trt.BuilderFlag.TF32)

    @property
    def tf32_allowed(self) -> bool:
        """The TF32 flag, as read back from the library."""
        return bool(self._config.get_flag(self._trt.BuilderFlag.TF32))

    def allow_refit(self, names: Sequence[str]) -> list[str]:
        """Allow these weights to be replaced later, and return the names of those that the network does not have.

        Plain REFIT is for all weights, and in 11.3.0 can drop a GEMM's bias; REFIT_IDENTICAL is for equal values.
        """
        self._config.set_flag(self._trt.BuilderFlag.REFIT_INDIVIDUAL)
        return [name for name in names if not self._network.mark_weights_refittable(name)]

    def allow_weight_streaming(self) -> None:
        """Allow the runtime to keep weights on the host."""
        self._config.set_flag(self._trt.BuilderFlag.WEIGHT_STREAMING)

    def layer_kinds(self) -> list[str]:
        """The kind of every layer of the parsed network, such as "PLUGIN_V3" or "MATRIX_MULTIPLY"."""
        return [self._network.get_layer(index).type.name for index in range(self._network.num_layers)]

    def add_profile(self, shapes: Mapping[str, ShapeRange]) -> bool:
        """Add an optimisation profile. Returns False if the library finds it invalid."""
        profile = self._builder.create_optimization_profile()
        for name, (smallest, likely, largest) in shapes.items():
            profile.set_shape(name, smallest, likely, largest)
        return int(self._config.add_optimization_profile(profile)) >= 0

    def set_targets(self, targets: Sequence[str]) -> None:
        """Choose the GPUs that the engine will run on; see engine/targets.py for the names."""
        if self.backend is Backend.TENSORRT_RTX:
            self._config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                capability = getattr(self._trt.ComputeCapability, target.upper())
                self._config.set_compute_capability(capability, index)
            return
        levels = self._trt.HardwareCompatibilityLevel
        self._config.hardware_compatibility_level = {
            "this-gpu": levels.NONE,
            "same-compute-capability": levels.SAME_COMPUTE_CAPABILITY,
            "ampere-plus": levels.AMPERE_PLUS,
        }[targets[0]]

    def use_timing_cache(self, data: bytes) -> None:
        """Start from a saved timing cache; b"" makes a new one. Only for `tensorrt`: TensorRT-RTX times no kernels."""
        self._config.set_timing_cache(self._config.create_timing_cache(data), ignore_mismatch=False)

    def timing_cache(self) -> bytes:
        """The timing cache after a build."""
        return bytes(self._config.get_timing_cache().serialize())

    def build(self, file: BinaryIO) -> bool:
        """Build the engine and write it to the file piece by piece, so that memory never holds a second copy of it.

        Returns:
            False if the library refuses to build; `errors()` says why.

        Raises:
            Whatever the file's write or the progress callback raises.
        """
        writer = _make_writer(self._trt, file)
        built = bool(self._builder.build_serialized_network_to_stream(self._network, self._config, writer))
        for callback in (writer, self._monitor):
            if callback is not None and callback.error is not None:
                raise callback.error
        return built

    def errors(self) -> list[str]:
        """The messages that the library logged as errors, oldest first."""
        texts = self._said.errors(self._begun_at)
        return [text.split(_NO_DRIVER)[0].rstrip("; \n") for text in texts]

    def warnings(self) -> list[str]:
        """The messages that the library logged as warnings, oldest first."""
        return [text for severity, text in self._said.since(self._begun_at) if severity == "WARNING"]


# On a machine without a GPU, the library appends this to every message. It says nothing about the graph.
_NO_DRIVER = "[checkMacros.cpp::catchCudaError"


def _describe(error: Any) -> str:
    lines = [line for line in error.desc().splitlines() if _NO_DRIVER not in line]
    place = error.node_name() or ("an unnamed node" if error.node() >= 0 else "the graph")
    operator = f" ({error.node_operator()})" if error.node_operator() else ""
    return f"{place}{operator}: {' / '.join(lines)}"


# The base classes of callbacks depend on the library that is chosen, so subclasses are defined inside functions. An
# exception must not cross into C++: it is kept in .error, the callback returns "stop", and build() raises it.


def _make_monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._steps: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = (0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1, self._steps.get(phase_name, (0, step + 1))[1])
            return self.error is None

        def phase_finish(self, phase_name: str) -> None:
            step, steps = self._steps.pop(phase_name, (0, 0))
            if step < steps:  # a phase may end without reporting its last steps
                self._tell(phase_name, steps, steps)

        def _tell(self, phase: str, step: int, steps: int) -> None:
            if phase in self._steps:
                self._steps[phase] = (step, steps)
            if self.error is None:
                try:
                    progress(phase, step, steps)
                except (
                    BaseException
                ) as error:  # KeyboardInterrupt too: it stops the build and is raised after it
                    self.error = error

    return Monitor()


def _make_writer(trt: Any, file: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: BaseException | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()
