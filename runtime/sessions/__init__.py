"""Backends, in order of preference, and how to open one. A new backend is one file here and one row below."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.errors import SessionError
from ditc.runtime.gpu import NO_GPU, check_engine, find_gpu, library_version
from ditc.runtime.session import Session
from ditc.runtime.spec import Backend

if TYPE_CHECKING:
    from ditc.runtime.sessions.device import Device

# Engines first: they are what a GPU is there for. TensorRT before RTX: where both run, it was built on that very GPU.
ENGINES = (Backend.TENSORRT, Backend.TENSORRT_RTX)


def available_backends() -> dict[Backend, str]:
    """Backends that can run on this machine, best first, each with the reason."""
    backends: dict[Backend, str] = {}
    gpu = find_gpu()
    for backend in ENGINES:
        if gpu is not None and not missing(backend):
            backends[backend] = f"{gpu.name} ({gpu.sm}), {backend.value} {library_version(backend)}"
    if find_spec("onnxruntime") is not None:
        backends[Backend.ONNXRUNTIME] = "ONNX Runtime is installed"
    return backends


def missing(backend: Backend) -> str:
    """What an engine backend lacks on this machine, with the command that helps; "" if nothing."""
    extra = "rtx" if backend is Backend.TENSORRT_RTX else "tensorrt"
    if library_version(backend) is None:
        return f'{backend.value} is not installed: pip install "ditc[{extra}]"'
    try:
        found = find_spec("cuda.bindings")
    except ModuleNotFoundError:  # no package `cuda` at all
        found = None
    if found is None:
        return f'cuda-python is not installed: pip install "ditc[{extra}]"'
    return "" if find_gpu() is not None else NO_GPU


def open_session(
    model: Path,
    artifact: Artifact,
    *,
    threads: int = 0,
    provider: str = "auto",
    device: Device | None = None,
    stream_weights: bool = False,
) -> Session:
    """A session for the artifact's backend.

    Args:
        provider: of ONNX Runtime: auto (CUDA where it is there), cpu, cuda or openvino.
        device: for engines: what the stages of a bundle share (`open_device`). None: one of its own.
        stream_weights: for engines that were built so: keep the weights on the host.

    Raises:
        SessionError: the backend cannot run here or cannot load the file.
    """
    if artifact.backend is Backend.ONNXRUNTIME:
        from ditc.runtime.sessions.onnxruntime import open_onnxruntime

        return open_onnxruntime(
            model, artifact.spec, precision=artifact.precision, threads=threads, provider=provider
        )
    gpu, library = find_gpu(), library_version(artifact.backend)
    check_engine(artifact, gpu=gpu, library=library)
    lack = missing(artifact.backend)
    if gpu is None or lack:
        raise SessionError(
            f"{artifact.spec.name}: {lack}", hint="or run the ONNX Runtime artifact: --backend onnxruntime"
        )
    from ditc.runtime.gpu import driver_version
    from ditc.runtime.sessions.kernel_cache import cache_folder, kernel_cache
    from ditc.runtime.sessions.tensorrt import TensorRTSession
    from ditc.runtime.sessions.tensorrt_engine import TensorRTEngine

    kernels = kernel_cache(
        cache_folder(), gpu=gpu.name, driver=driver_version(), library=library or "", engine=artifact.key
    )
    shared = device if device is not None else open_device()
    engine = TensorRTEngine(
        model,
        artifact.backend,
        stage=artifact.spec.name,
        gpu=gpu,
        kernels=kernels,
        stream_weights=stream_weights,
    )
    return TensorRTSession(engine, artifact.spec, shared, name=artifact.backend.value)


def open_device() -> Device:
    """This machine's first GPU, for the engines of one bundle to share. Raises SessionError, MissingExtra."""
    from ditc.runtime.sessions.cuda import CudaRuntime
    from ditc.runtime.sessions.device import Device

    return Device(CudaRuntime())
