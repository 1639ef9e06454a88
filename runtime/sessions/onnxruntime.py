"""Runs a stage with ONNX Runtime: the CPU provider anywhere, CUDA's and OpenVINO's where they are installed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.errors import MissingExtra, SessionError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.session import ComputeDevice, Session, Tensor, to_numpy
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.onnxruntime_cuda import CUDA, cuda_lack
from ditc.runtime.sessions.registry import BackendRow
from ditc.runtime.spec import DENOISER, Precision, StageSpec

log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"

DEVICES = {
    # It computes fp16 in fp32 and has no bf16 (1.31). The export runs every graph on it that it can run.
    CPU: ComputeDevice(
        kind="cpu", name="ONNX Runtime's CPU provider", native_16_bits=False, tried_at_build=True
    ),
    CUDA: ComputeDevice(kind="cuda", name="ONNX Runtime's CUDA provider"),
    # It compiles kernels for the very CPU that it finds.
    OPENVINO: ComputeDevice(kind="cpu", name="ONNX Runtime's OpenVINO provider"),
}


class OnnxRuntimeSession:
    """One stage in ONNX Runtime.

    Args:
        model: the .onnx file; external weights lie beside it.
        spec: what the stage promises; the graph is held against it.
        provider: an execution provider's name, or None for CUDA when present, else the CPU. OPENVINO runs on the
            CPU too, and needs the extra of that name.
        threads: intra-op threads; 0 lets ONNX Runtime choose.
        cuda_graph: let the CUDA provider capture; the graph must then run on it alone.
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
    ) -> None:
        import onnxruntime as ort

        self.spec = spec
        provider = provider or (CPU if cuda_lack() else CUDA)
        self.device = DEVICES[provider]
        if precision is Precision.BF16 and provider == CPU:
            raise SessionError(
                f"{spec.name}: ONNX Runtime's CPU provider has no bf16 kernels (NOT_IMPLEMENTED in 1.31)",
                hint="add fp32 stages for this CPU: ditc build CHECKPOINT -o BUNDLE; or run the bundle on a GPU",
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if precision is Precision.INT8:
            # Without VNNI, ONNX Runtime's u8 x s8 kernel adds pairs in 16 bits and saturates (its quantization page,
            # "U8S8"): this makes it u8 x u8 there, exact and slower. CPUs with VNNI ignore it.
            options.add_session_config_entry("session.x64quantprecision", "1")
        if precision is Precision.FP8:
            # ONNX Runtime 1.31 fuses FP8 pairs into MatMulIntegerToFloat, which has no FP8 ("INVALID_GRAPH: Type
            # 'tensor(float8e4m3fn)' ... is invalid"): without that fusion it computes them in fp32.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        # fp32 means fp32: the CUDA provider uses TF32 unless told otherwise (ONNX Runtime, CUDA provider options).
        tf32 = "1" if precision is Precision.TF32 else "0"
        providers: list[Any] | None = [provider]
        if provider == CUDA:
            providers = [(CUDA, {"use_tf32": tf32, "enable_cuda_graph": str(int(cuda_graph))}), CPU]
        if provider == OPENVINO:
            _add_openvino(options, threads)
            providers = None
        try:
            # Without fallback: ONNX Runtime would say on stdout that it goes on with other providers, and go on.
            self._session = ort.InferenceSession(str(model), options, providers=providers, enable_fallback=0)
        except Exception as e:  # onnxruntime raises classes of its C API that share no base but Exception
            # Its CUDA provider has no Resize and no DepthToSpace in bf16 (1.31.1): a decoder in bf16 is an engine's.
            lacks = "ONNX Runtime lacks some bf16 kernels: add fp32 stages, ditc build CHECKPOINT -o BUNDLE"
            raise SessionError(
                f"{spec.name}: ONNX Runtime cannot load {model.name}: {first_line(e)}",
                hint=lacks if precision is Precision.BF16 else None,
            ) from e
        if provider not in self._session.get_providers():
            raise SessionError(
                f"{spec.name}: ONNX Runtime made a session without {provider}, only with "
                f"{', '.join(self._session.get_providers())}",
                hint="ONNX Runtime's log, above, has the reason; or run with --provider cpu",
            )
        self._outputs = [out.name for out in self._session.get_outputs()]
        self._check_graph()

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Execute the stage once on host arrays; extra feeds are refused by ONNX Runtime, missing ones named."""
        try:
            results = self._session.run(self._outputs, {name: to_numpy(feed) for name, feed in feeds.items()})
        except Exception as e:  # as above
            shapes = {name: tuple(feed.shape) for name, feed in feeds.items()}
            raise SessionError(f"{self.spec.name}: {first_line(e)}; fed {shapes}") from e
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        """Release the graph and its memory."""
        if hasattr(self, "_session"):
            del self._session

    def _check_graph(self) -> None:
        promised = ([i.name for i in self.spec.inputs], [o.name for o in self.spec.outputs])
        found = ([i.name for i in self._session.get_inputs()], self._outputs)
        if sorted(promised[0]) != sorted(found[0]) or sorted(promised[1]) != sorted(found[1]):
            raise SessionError(
                f"{self.spec.name}: the graph takes {found[0]} and gives {found[1]}, "
                f"the manifest promises {promised[0]} and {promised[1]}",
                hint="the bundle is inconsistent: build it again",
            )


def lack(row: BackendRow) -> str:
    """What ONNX Runtime lacks to run on this machine's CPU; "" if nothing."""
    return "" if find_spec("onnxruntime") is not None else f"{row.title} is not installed: {row.install}"


def open_stage(
    row: BackendRow, model: Path, artifact: Artifact, options: LoadOptions, device: Device | None
) -> Session:
    """The session of the provider that the options name; "auto" is CUDA's where that can run, else the CPU's.

    Raises:
        SessionError: no CUDA provider here. MissingExtra: no OpenVINO here.
    """
    spec, precision = artifact.spec, artifact.precision
    provider = "cpu" if options.provider == "auto" and cuda_lack() else options.provider
    if provider in ("cpu", "openvino"):
        name = OPENVINO if provider == "openvino" else CPU
        return OnnxRuntimeSession(model, spec, precision=precision, provider=name, threads=options.threads)
    from ditc.runtime.sessions.onnxruntime_device import open_bound

    # The denoiser runs many times with one shape; the other stages once a request.
    return open_bound(model, spec, precision=precision, graphs=spec.name == DENOISER)


def _add_openvino(options: Any, threads: int) -> None:
    """Put OpenVINO's CPU device into the session's options; a plugin library, registered once a process."""
    import onnxruntime as ort

    try:
        import onnxruntime_ep_openvino as openvino
    except ImportError as e:
        raise MissingExtra("onnxruntime-ep-openvino", "openvino") from e
    if not any(device.ep_name == OPENVINO for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(OPENVINO, openvino.get_library_path())
    devices = [
        device
        for device in ort.get_ep_devices()
        if device.ep_name == OPENVINO and device.device.type == ort.OrtHardwareDeviceType.CPU
    ]
    if not devices:  # onnxruntime-ep-openvino 1.8.1 lists none on an AMD CPU
        raise SessionError(
            "OpenVINO's plugin offers no CPU device on this machine", hint="run with --provider cpu"
        )
    # ACCURACY keeps every type of the graph: by default OpenVINO lowers fp32 to bf16 where the CPU has it, islands too.
    settings = {"precision": "ACCURACY", **({"num_of_threads": str(threads)} if threads else {})}
    options.add_provider_for_devices(devices, settings)


def first_line(error: Exception) -> str:
    """What a library's exception says, without its stack."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
