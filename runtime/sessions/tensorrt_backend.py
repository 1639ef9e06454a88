"""The functions of TensorRT's and TensorRT-RTX's rows: what they lack on this machine, and how they open a stage."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.gpu import driver_version, find_gpu, no_gpu
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.session import Array, Session
from ditc.runtime.sessions.device import Device, open_device
from ditc.runtime.sessions.kernel_cache import cache_folder, kernel_cache
from ditc.runtime.sessions.registry import BackendRow, library_version
from ditc.runtime.sessions.tensorrt import TensorRTSession
from ditc.runtime.sessions.tensorrt_engine import TensorRTEngine


def lack(row: BackendRow) -> str:
    """What is missing first, the library, cuda-python or a GPU; "" if engines can run here."""
    if library_version(row.name) is None:
        return f"{row.name} is not installed: {row.install}"
    try:
        found = find_spec("cuda.bindings")
    except ModuleNotFoundError:  # there is no package `cuda` at all
        found = None
    if found is None:
        return f"cuda-python is not installed: {row.install}"
    return "" if find_gpu() is not None else no_gpu()


def open_stage(
    row: BackendRow, model: Path, artifact: Artifact, options: LoadOptions, device: Device | None
) -> Session:
    """Open an engine on the device that the bundle's stages share, or on its own device if there is none.

    Raises:
        SessionError: the engine is not for this GPU, library or driver, or the file is damaged.
    """
    return _open(row, model, artifact, options, device, {})


def open_changed(
    row: BackendRow,
    model: Path,
    artifact: Artifact,
    options: LoadOptions,
    device: Device | None,
    weights: Mapping[str, Array],
) -> Session:
    """Open an engine that was built with `--refit`, with other values of some weights.

    Raises:
        SessionError: as `open_stage`, or the library refuses the values.
    """
    return _open(row, model, artifact, options, device, weights)


def _open(
    row: BackendRow,
    model: Path,
    artifact: Artifact,
    options: LoadOptions,
    device: Device | None,
    weights: Mapping[str, Array],
) -> Session:
    gpu, shared = find_gpu(), device if device is not None else open_device()
    folder = cache_folder()
    kernels = (
        None
        if folder is None
        else kernel_cache(
            folder,
            gpu=gpu.name if gpu is not None else "",
            driver=driver_version(),
            library=library_version(row.name) or "",
            engine=artifact.key,
        )
    )
    engine = TensorRTEngine(
        model,
        row.name,
        stage=artifact.spec.name,
        gpu=gpu,
        kernels=kernels,
        stream_weights=options.low_vram,
    )
    if weights:
        engine.refit(weights)
    return TensorRTSession(engine, artifact.spec, shared, name=row.name)
