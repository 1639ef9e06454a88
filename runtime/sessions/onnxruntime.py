"""Runs a stage with ONNX Runtime, on its CPU provider or, if it is installed, on CUDA's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.cores import default_threads
from ditc.runtime.cpu_features import int8_products_saturate
from ditc.runtime.errors import SessionError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.session import Array, ComputeDevice, Session, Tensor, closed, to_numpy
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.onnxruntime_cuda import CUDA, cuda_lack
from ditc.runtime.sessions.onnxruntime_weights import replace_weights
from ditc.runtime.sessions.registry import BackendRow
from ditc.runtime.spec import DENOISER, DType, Precision, StageSpec

# Of inputs that may be left out, as ONNX Runtime names them.
NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
NO_BF16 = "ONNX Runtime's CPU provider has no bf16 kernels (NOT_IMPLEMENTED in 1.31)"

DEVICES = {
    # This provider computes fp16 in fp32 and has no bf16 (1.31). Every build runs its graphs on it, except bf16 ones.
    CPU: ComputeDevice(
        kind="cpu", name="ONNX Runtime's CPU provider", native_16_bits=False, tried_at_build=True
    ),
    CUDA: ComputeDevice(kind="cuda", name="ONNX Runtime's CUDA provider"),
}


class OnnxRuntimeSession:
    """One stage in ONNX Runtime.

    Args:
        model: the .onnx file, with its external weights beside it.
        spec: the spec of the stage. The graph must have the same inputs and outputs.
        precision: the precision of the artifact.
        provider: the name of an execution provider. None takes CUDA if it works here, else the CPU.
        threads: the number of intra-op threads; 0 takes one per core that this process may use.
        cuda_graph: let the CUDA provider capture CUDA graphs. It must then support every node of the graph.
        profile: the beginning of the path of a file into which ONNX Runtime's profiler writes.
        weights: other values of some of the graph's initializers, by name.

    Raises:
        SessionError: ONNX Runtime cannot load the graph with this provider, or the graph does not fit the spec.
    """

    def __init__(
        self,
        model: Path,
        spec: StageSpec,
        *,
        precision: Precision = Precision.FP32,
        provider: str | None = None,
        threads: int = 0,
        cuda_graph: bool = False,
        profile: Path | None = None,
        weights: Mapping[str, Array] | None = None,
    ) -> None:
        import onnxruntime as ort

        self.spec = spec
        provider = provider or (CPU if cuda_lack() else CUDA)
        self.device = DEVICES[provider]
        if provider == CPU and _has_bf16(spec, precision):
            raise SessionError(
                f"{spec.name}: {NO_BF16}",
                hint="add stages for this CPU: ditc build CHECKPOINT -o BUNDLE, with --backend openvino for bf16; or "
                "run the bundle on a GPU",
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or default_threads()
        # Each session has its own threads. After a run they would spin, and take the cores from the next stage: with a
        # new prompt, the demo's picture then takes a tenth to a half longer (docs/backends.md).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        # Without this, the end of the file's name decides, and ORT's own format was never checked.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        if precision in (Precision.INT8, Precision.INT8_DYNAMIC) and int8_products_saturate():
            # On CPUs without VNNI, ONNX Runtime's u8 x s8 kernel adds pairs of products in 16 bits and saturates (its
            # quantization page, "U8S8"). This setting makes it use u8 x u8, which is exact there. On an Intel Xeon with
            # VNNI, ONNX Runtime 1.32 obeys the setting too, and its u8 x u8 kernel takes 4 to 6 times as long.
            options.add_session_config_entry("session.x64quantprecision", "1")
        if precision is Precision.FP8:
            # ONNX Runtime 1.31 fuses FP8 Q/DQ pairs into MatMulIntegerToFloat, which does not support FP8
            # ("INVALID_GRAPH: Type 'tensor(float8e4m3fn)' ... is invalid"). Without the fusion it computes in fp32.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        # By default the CUDA provider computes fp32 graphs in TF32 (ONNX Runtime, CUDA provider options, "use_tf32").
        tf32 = "1" if precision is Precision.TF32 else "0"
        providers: list[Any] = [provider]
        if provider == CUDA:
            providers = [(CUDA, {"use_tf32": tf32, "enable_cuda_graph": str(int(cuda_graph))}), CPU]
        source: str | bytes = str(model)
        if weights:
            source = replace_weights(options, model, weights)
        try:
            # With its fallback, ONNX Runtime would continue with other providers, and say so only on stdout.
            self._session = ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
        except Exception as e:  # onnxruntime raises classes of its C API that share no base but Exception
            # bf16 decoders need an engine: the CUDA provider has no bf16 Resize or DepthToSpace (1.31.1).
            hint = "ONNX Runtime has no bf16 kernels for some operations: add fp32 stages with ditc build CHECKPOINT "
            raise SessionError(
                f"{spec.name}: ONNX Runtime cannot load {model.name}: {first_line(e)}",
                hint=f"{hint}-o BUNDLE" if precision is Precision.BF16 else None,
            ) from e
        if provider not in self._session.get_providers():
            raise SessionError(
                f"{spec.name}: ONNX Runtime made a session without {provider}, only with "
                f"{', '.join(self._session.get_providers())}",
                hint="see ONNX Runtime's messages above for the reason, or run with --provider cpu",
            )
        self._outputs = [out.name for out in self._session.get_outputs()]
        self._check_graph()

    @property
    def optional_inputs(self) -> dict[str, np.dtype[np.generic]]:
        """The element types of the inputs that may be left out, by name: initializers that are inputs too."""
        self._check_open()
        optional = self._session.get_overridable_initializers()
        return {i.name: np.dtype(NUMPY_TYPES[i.type]) for i in optional if i.type in NUMPY_TYPES}

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the stage once on arrays of the host. ONNX Runtime checks names, types and shapes of the inputs."""
        self._check_open()
        try:
            results = self._session.run(self._outputs, {name: to_numpy(feed) for name, feed in feeds.items()})
        except Exception as e:  # onnxruntime raises classes of its C API that share no base but Exception
            shapes = {name: tuple(feed.shape) for name, feed in feeds.items()}
            raise SessionError(
                f"{self.spec.name}: {first_line(e)}; the inputs were {shapes}",
                hint="if memory ran out, draw fewer or smaller pictures; else check the bundle with ditc verify --run",
            ) from e
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        """Release the graph and its memory."""
        if hasattr(self, "_session"):
            del self._session

    def _check_open(self) -> None:
        if not hasattr(self, "_session"):
            raise closed(self.spec)

    def _check_graph(self) -> None:
        promised = ([i.name for i in self.spec.inputs], [o.name for o in self.spec.outputs])
        found = ([i.name for i in self._session.get_inputs()], self._outputs)
        if sorted(promised[0]) != sorted(found[0]) or sorted(promised[1]) != sorted(found[1]):
            raise SessionError(
                f"{self.spec.name}: the graph takes {found[0]} and gives {found[1]}, "
                f"but the manifest promises {promised[0]} and {promised[1]}",
                hint="the bundle is inconsistent: build it again",
            )


def lack(row: BackendRow) -> str:
    """What ONNX Runtime lacks to run on this machine's CPU; "" if it lacks nothing."""
    return "" if find_spec("onnxruntime") is not None else f"{row.title} is not installed: {row.install}"


def cannot(artifact: Artifact) -> str:
    """Why ONNX Runtime cannot run the artifact on this machine; "" if it can."""
    return NO_BF16 if _has_bf16(artifact.spec, artifact.precision) and cuda_lack() else ""


def _has_bf16(spec: StageSpec, precision: Precision) -> bool:
    """Whether a graph computes in bf16. An 8-bit denoiser whose other parts are bf16 also takes bf16 inputs."""
    tensors = (*spec.inputs, *spec.outputs)
    return precision is Precision.BF16 or any(tensor.dtype is DType.BFLOAT16 for tensor in tensors)


def open_stage(
    row: BackendRow, model: Path, artifact: Artifact, options: LoadOptions, device: Device | None
) -> Session:
    """Open a session with the provider that the options name. "auto" takes CUDA if it works here, else the CPU.

    Raises:
        SessionError: the CUDA provider is requested but cannot run here, or the stage cannot be loaded.
    """
    spec, precision = artifact.spec, artifact.precision
    if _on_cpu(options):
        return OnnxRuntimeSession(model, spec, precision=precision, provider=CPU, threads=options.threads)
    from ditc.runtime.sessions.onnxruntime_device import open_on_device

    # CUDA graphs pay off for the denoiser, which runs many times with the same shapes. The other stages run once per
    # request.
    return open_on_device(model, spec, precision=precision, graphs=spec.name == DENOISER)


def open_changed(
    row: BackendRow,
    model: Path,
    artifact: Artifact,
    options: LoadOptions,
    device: Device | None,
    weights: Mapping[str, Array],
) -> Session:
    """Open a session with other values of some initializers, with the provider that the options name.

    Raises:
        SessionError: as `open_stage`.
    """
    spec, precision = artifact.spec, artifact.precision
    if _on_cpu(options):
        return OnnxRuntimeSession(
            model, spec, precision=precision, provider=CPU, threads=options.threads, weights=weights
        )
    from ditc.runtime.sessions.onnxruntime_device import open_on_device

    graphs = spec.name == DENOISER
    return open_on_device(model, spec, precision=precision, graphs=graphs, weights=weights)


def takes_loras(options: LoadOptions) -> bool:
    """Whether its sessions take LoRAs as inputs: those of the CPU provider do."""
    return _on_cpu(options)


def _on_cpu(options: LoadOptions) -> bool:
    return options.provider == "cpu" or (options.provider == "auto" and bool(cuda_lack()))


def first_line(error: Exception) -> str:
    """The first line of a library's error message, without the stack that follows it."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
