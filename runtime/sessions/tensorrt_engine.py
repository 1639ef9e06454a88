"""Engines over TensorRT's runtime API, which only this file uses. `tensorrt` 11 and `tensorrt_rtx` 1.7 share the code.

The two libraries differ in three places. TensorRT-RTX says before an engine is loaded whether it can run here. It
compiles kernels when a context is made, and can keep them in a runtime cache. And it can capture CUDA graphs by itself,
which ditc turns off.
"""

from __future__ import annotations

import importlib
import logging
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditc.runtime.errors import MissingExtra, SessionError
from ditc.runtime.gpu import Gpu
from ditc.runtime.plugins import register
from ditc.runtime.session import Array
from ditc.runtime.sessions.engine import Binding, Shape, ShapeRange
from ditc.runtime.sessions.kernel_cache import KernelCache
from ditc.runtime.sessions.registry import row_of
from ditc.runtime.sessions.tensorrt_log import message_log
from ditc.runtime.spec import Backend, DType

log = logging.getLogger(__name__)

REBUILD = "build the engine again with this version of ditc, or run with --backend onnxruntime"

MODULES = {Backend.TENSORRT_RTX: "tensorrt_rtx", Backend.TENSORRT: "tensorrt"}


def load_library(backend: Backend) -> Any:
    """Import the backend's Python module. Raises MissingExtra if it is not installed."""
    module = MODULES[backend]
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise MissingExtra(module, row_of(backend).extra or module) from e


class TensorRTEngine:
    """An engine that was loaded from its file.

    Args:
        stage: the stage's name, for messages.
        gpu: this machine's GPU, for messages.
        kernels: where TensorRT-RTX keeps the kernels that it compiles for this GPU. With None, every process compiles
            them anew.
        stream_weights: keep weights on the host and copy them to the GPU when layers need them, if the engine was built
            for that. This is slower, and saves up to `streamable_weights_size` bytes of GPU memory.

    Raises:
        SessionError: the engine is not for this GPU, library or driver, or the file is damaged.
    """

    def __init__(
        self,
        path: Path,
        backend: Backend,
        *,
        stage: str,
        gpu: Gpu | None,
        kernels: KernelCache | None = None,
        stream_weights: bool = False,
    ) -> None:
        trt = load_library(backend)
        self.backend = backend
        self._trt, self._stage, self._kernels = trt, stage, kernels
        self._messages = message_log(trt)
        self._messages.pass_on = True
        self._opened_at = self._messages.count
        if backend is Backend.TENSORRT_RTX:
            # TensorRT's engines contain their plugin's kernel and need no registration. Its builder registers a plugin
            # under the same name (a QDP), and the registry keeps only the first one with a name.
            register(trt)
        self._runtime = trt.Runtime(self._messages.logger)
        if self._runtime is None:
            raise SessionError(
                f"{stage}: {backend.value} did not start: {self.last_error()}",
                hint="check the driver and the library with ditc doctor",
            )
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._check_validity(data, gpu)
            self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise SessionError(
                f"{stage}: {backend.value} {trt.__version__} cannot load {path.name}: {self.last_error()}",
                hint=f"build it here: ditc build CHECKPOINT -o BUNDLE --backend {backend.value}",
            )
        self._stream_weights(stream_weights)
        self._cache: Any = None

    @property
    def bindings(self) -> tuple[Binding, ...]:
        return tuple(self._binding(name) for name in self._names())

    @property
    def profiles(self) -> tuple[Mapping[str, ShapeRange], ...]:
        inputs = [binding.name for binding in self.bindings if binding.is_input]
        return tuple(
            {name: self._range(name, index) for name in inputs}
            for index in range(self._engine.num_optimization_profiles)
        )

    def context(self, profile: int, stream: int) -> TensorRTContext:
        """Make an execution context without memory of its own. TensorRT-RTX compiles its kernels, or takes cached ones.

        Args:
            profile: the index of the profile.
            stream: the stream that will run the context. Choosing a profile makes copies, which must be in the same
                stream: it is non-blocking, so it waits for no other stream, not even for stream 0.

        Raises:
            SessionError: the library cannot make the context, or refuses the profile.
        """
        trt = self._trt
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.backend is Backend.TENSORRT_RTX:
            # Our graphs contain many runs. A run that the library captures by itself cannot be part of such a graph.
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            # Lazy specialisation replaces kernels after some runs. A captured graph would keep the first, slow ones.
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            self._use_cache(config)
        context = self._engine.create_execution_context(config)
        if context is None:
            raise SessionError(
                f"{self._stage}: no execution context could be made: {self.last_error()}",
                hint="free memory of the GPU, try --low-vram, or run with --backend onnxruntime",
            )
        # Profile 0 is what the library chooses by itself for the first context.
        if profile and not context.set_optimization_profile_async(profile, stream):
            raise SessionError(
                f"{self._stage}: profile {profile} is refused: {self.last_error()}", hint=REBUILD
            )
        return TensorRTContext(context, int(self._engine.get_device_memory_size_for_profile_v2(profile)))

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Replace weights by name. Their arrays are read before this returns, and must be contiguous.

        Raises:
            SessionError: the library refuses a weight, or the whole. The engine must then not be used.
        """
        trt = self._trt
        refitter = trt.Refitter(self._engine, self._messages.logger)
        for name, array in weights.items():
            kind = getattr(trt.DataType, _WEIGHT_TYPES[array.dtype])
            if not refitter.set_named_weights(name, trt.Weights(kind, array.ctypes.data, array.size)):
                raise self._refit_error(f"does not take {name} with {array.size} {kind.name} values")
        missing = refitter.get_missing_weights()
        if missing:
            raise self._refit_error(f"needs values of {missing[0]} too")
        if not refitter.refit_cuda_engine():
            raise self._refit_error("fails")

    def _refit_error(self, what: str) -> SessionError:
        return SessionError(
            f"{self._stage}: {self.backend.value}'s exchange of weights {what}: {self.last_error()}",
            hint="build the bundle with the LoRA in its weights (ditc build --lora), or run with --backend onnxruntime",
        )

    def last_error(self) -> str:
        errors = self._messages.errors(self._opened_at)
        return errors[-1].splitlines()[0] if errors else "no message"

    def close(self) -> None:
        """Save the compiled kernels, then free the engine."""
        self._save_kernels()
        self._cache = self._engine = self._runtime = None

    def _check_validity(self, data: Any, gpu: Gpu | None) -> None:
        """Raise SessionError if the library refuses the engine, with its reasons, the GPU, and what to do about it."""
        header = data[: int(getattr(self._runtime, "engine_header_size", 0))]
        valid, reasons = validity(self._trt, self._runtime, header)
        if valid:
            if reasons:
                log.warning(
                    "%s: the engine runs here, but slower than it could (%s)", self._stage, ", ".join(reasons)
                )
            return
        why = "; ".join(f"{name} ({_MEANINGS[name]})" if name in _MEANINGS else name for name in reasons)
        where = f"{gpu.name} ({gpu.sm})" if gpu is not None else "a machine without a GPU"
        target = f" --targets {gpu.sm}" if gpu is not None else ""
        backend = self.backend.value
        raise SessionError(
            f"{self._stage}: {backend} {self._trt.__version__} refuses the engine on {where}: "
            f"{why or self.last_error()}",
            hint=next(
                (_HINTS[name] for name in reasons if name in _HINTS),
                f"build it for this GPU: ditc build CHECKPOINT -o BUNDLE --backend {backend}{target}",
            ),
        )

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]

    def _binding(self, name: str) -> Binding:
        trt, engine = self._trt, self._engine
        kind = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise SessionError(
                f"{self._stage}: {name} of the engine has element type {kind}, which no stage has",
                hint=REBUILD,
            )
        return Binding(
            name,
            _DTYPES[kind],
            engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            engine.get_tensor_location(name) == trt.TensorLocation.HOST,
        )

    def _range(self, name: str, profile: int) -> ShapeRange:
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, profile)
        return ShapeRange(tuple(smallest), tuple(largest))

    def _stream_weights(self, wanted: bool) -> None:
        """Set the budget for weights on the GPU. Without a budget, the library keeps all weights there."""
        engine = self._engine
        if not wanted or not engine.streamable_weights_size:
            return
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        log.info(
            "%s: %.2f of %.2f GB of weights stay on the GPU, and the others are streamed",
            self._stage,
            engine.weight_streaming_budget_v2 / 1e9,
            engine.streamable_weights_size / 1e9,
        )

    def _use_cache(self, config: Any) -> None:
        """Use one runtime cache for all contexts of the engine. If the library refuses the cached file, delete it."""
        if self._kernels is None:
            return
        if self._cache is None:
            cache, known = config.create_runtime_cache(), self._kernels.load()
            if known and not cache.deserialize(known):
                log.info(
                    "%s: the library refuses the cached kernels, so they are compiled again", self._stage
                )
                self._kernels.discard()
                cache, known = config.create_runtime_cache(), b""
            if not known:  # this takes up to half a minute on two cores, for the demo
                log.warning(
                    "%s: compiling its kernels for this GPU; they are kept for the next start", self._stage
                )
            self._cache = cache
        else:
            # A context finds the kernels that another context compiled only after they were serialised (1.7.1). Without
            # this, every new loop would compile its kernels again.
            self._save_kernels()
        if not config.set_runtime_cache(self._cache):
            log.warning("%s: the library does not use the cache of compiled kernels", self._stage)

    def _save_kernels(self) -> None:
        if self._cache is not None and self._kernels is not None:
            self._kernels.save(bytes(self._cache.serialize()))


class TensorRTContext:
    """An execution context with one profile.

    Args:
        largest: the size of the workspace in bytes for the profile's largest shapes.
    """

    def __init__(self, context: Any, largest: int) -> None:
        self._context, self._largest = context, largest

    def set_shape(self, name: str, shape: Shape) -> bool:
        return bool(self._context.set_input_shape(name, shape))

    def shape(self, name: str) -> Shape:
        return tuple(self._context.get_tensor_shape(name))

    def set_address(self, name: str, pointer: int) -> None:
        if not self._context.set_tensor_address(name, pointer):
            raise SessionError(f"the engine refuses {pointer:#x} as the address of {name}", hint=REBUILD)

    def workspace_bytes(self) -> int:
        # 0 means that the library cannot say (IExecutionContext::updateDeviceMemorySizeForShapes).
        return int(self._context.update_device_memory_size_for_shapes()) or self._largest

    def set_workspace(self, pointer: int, size_bytes: int) -> None:
        self._context.set_device_memory(pointer, size_bytes)

    def enqueue(self, stream: int) -> bool:
        return bool(self._context.execute_async_v3(stream))

    def report_to(self, profiler: Any) -> None:
        """Let every run report the time of its layers to the library's IProfiler, and wait for that."""
        self._context.profiler = profiler

    def capturable(self, stream: int) -> bool:
        """Ask TensorRT-RTX. TensorRT cannot be asked, so the answer is True, and its capture may still fail."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(stream))


# The types of weights by those of arrays; bf16 numbers are given as their bits.
_WEIGHT_TYPES = {np.dtype(np.float32): "FLOAT", np.dtype(np.float16): "HALF", np.dtype(np.uint16): "BF16"}
_DTYPES = {
    "FLOAT": DType.FLOAT32,
    "HALF": DType.FLOAT16,
    "BF16": DType.BFLOAT16,
    "INT64": DType.INT64,
    "BOOL": DType.BOOL,
}

# TensorRT-RTX's reasons against an engine, by name of the flag in EngineInvalidityDiagnostics.
_MEANINGS = {
    "VERSION_MISMATCH": "it was built with another version of the library",
    "UNSUPPORTED_CC": "it was not built for this GPU's compute capability",
    "OLD_CUDA_DRIVER": "this machine's NVIDIA driver is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "MALFORMED_ENGINE": "the file is not an engine of this library",
    "CUDA_ERROR": "CUDA does not work here (no GPU, or no driver)",
}
_HINTS = {
    "OLD_CUDA_DRIVER": "update the NVIDIA driver",
    "INSUFFICIENT_GPU_MEMORY": "run with --low-vram, or build it for smaller pictures and a smaller --max-batch",
    "CUDA_ERROR": "run ditc doctor to check the GPU and its driver",
}


def validity(trt: Any, runtime: Any, header: bytes) -> tuple[bool, list[str]]:
    """Ask TensorRT-RTX whether it can load an engine here, and what speaks against it.

    Args:
        header: the first bytes of the engine's file.

    Returns:
        Whether it can be loaded, and the names of the reasons against it or against its speed. TensorRT cannot be asked
        and refuses an engine only when it loads it, so its answer is always (True, []).
    """
    if not hasattr(runtime, "get_engine_validity"):
        return True, []
    verdict, mask = runtime.get_engine_validity(header)
    flags = trt.EngineInvalidityDiagnostics.__members__.values()
    return verdict != trt.EngineValidity.INVALID, [flag.name for flag in flags if int(mask) & int(flag)]
