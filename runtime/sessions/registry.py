"""The table of backends: one row for each, in order of preference.

A new backend is one file beside this one and one row here. The loader, the verbs, the doctor, builds, parity and the
benchmarks read the rows and compare with no backend by name. Nothing here imports a backend's file, or NumPy, before
one of its functions is called: the options of the command line are made from the table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditc.runtime.errors import UsageError
from ditc.runtime.spec import Backend

if TYPE_CHECKING:
    from ditc.runtime.bundle.manifest import Artifact
    from ditc.runtime.load_options import LoadOptions
    from ditc.runtime.session import Session
    from ditc.runtime.sessions.device import Device

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRow:
    """What ditc has to know of a backend.

    Attributes:
        name: in manifests, in `--backend` and in the names of engine files.
        title: the library's own name, for messages.
        packages: Python packages, one of which holds the library; the version of the first that is installed counts.
        needs: Python packages that it needs besides, all of them.
        extra: of pyproject.toml, which installs these packages; None where ditc itself requires them.
        lack: what this machine lacks to run it, in one line with the command that helps; "" where it can run.
        open: opens a stage. Called once `lack` and the artifact's build have been checked.
        builds_engines: it runs engines, which a build makes from the stage's ONNX graph. Else it runs the graph itself.
        same_library: an engine runs only with the version of the library that built it.
        same_gpu: an engine runs only on the NVIDIA GPU, or the kinds of GPU, that it was built for. The sessions of a
            bundle share one CUDA device.
        built_on_gpu: the builder times kernels on the GPU that the engine is for. Else any machine builds them.
        targets: compute capabilities that engines can be built for; empty where the build follows from the machine.
        providers: what `--provider` may choose for it, besides "auto".
        polygraphy: the command by which NVIDIA's Polygraphy runs an artifact, `{model}` its file; "" where it cannot.
    """

    name: Backend
    title: str
    packages: tuple[str, ...]
    needs: tuple[str, ...] = ()
    extra: str | None = None
    lack: Callable[[BackendRow], str]
    open: Callable[[BackendRow, Path, Artifact, LoadOptions, Device | None], Session]
    builds_engines: bool = False
    same_library: bool = False
    same_gpu: bool = False
    built_on_gpu: bool = False
    targets: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    polygraphy: str = ""

    @property
    def install(self) -> str:
        """The command that installs its packages."""
        return "pip install ditc" if self.extra is None else f'pip install "ditc[{self.extra}]"'


def _later(module: str, function: str) -> Callable[..., Any]:
    """A function of a module that is imported when the function is first called."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments)

    return call


# tensorrt_rtx.ComputeCapability of 1.7.1. It has no sm90 and no sm100, and says of an engine there: "TensorRT-RTX does
# not support this compute capability, so the engine cannot be rebuilt for it".
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")

_TENSORRT, _ONNXRUNTIME = "ditc.runtime.sessions.tensorrt_backend", "ditc.runtime.sessions.onnxruntime"

# Engines first: they are what a GPU is there for. TensorRT before RTX: where both run, it was built on that very GPU.
_table: list[BackendRow] = [
    BackendRow(
        name=Backend.TENSORRT,
        title="TensorRT",
        packages=("tensorrt",),
        needs=("cuda-python",),
        extra="tensorrt",
        lack=_later(_TENSORRT, "lack"),
        open=_later(_TENSORRT, "open_stage"),
        builds_engines=True,
        same_library=True,  # version compatibility is an option of TensorRT's builder, which ditc does not set
        same_gpu=True,
        built_on_gpu=True,
        polygraphy="polygraphy run {model} --trt --model-type engine",
    ),
    BackendRow(
        name=Backend.TENSORRT_RTX,
        title="TensorRT-RTX",
        packages=("tensorrt-rtx",),
        needs=("cuda-python",),
        extra="rtx",
        lack=_later(_TENSORRT, "lack"),
        open=_later(_TENSORRT, "open_stage"),
        builds_engines=True,
        same_library=True,  # TensorRT-RTX 1.7.1 has no version compatibility
        same_gpu=True,
        targets=RTX_TARGETS,
        polygraphy="POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run {model} --trt --model-type engine",
    ),
    BackendRow(
        name=Backend.ONNXRUNTIME,
        title="ONNX Runtime",
        packages=("onnxruntime", "onnxruntime-gpu"),
        lack=_later(_ONNXRUNTIME, "lack"),
        open=_later(_ONNXRUNTIME, "open_stage"),
        providers=("cpu", "cuda", "openvino"),
        polygraphy="polygraphy run {model} --onnxrt",
    ),
]

# Every build makes ONNX graphs, and their artifacts are of this backend. Engines are built from them.
GRAPH_BACKEND = Backend.ONNXRUNTIME


def rows() -> tuple[BackendRow, ...]:
    """All backends, the preferred first."""
    return tuple(_table)


def find_row(name: str) -> BackendRow | None:
    """The row of a backend; None for one that this version of ditc does not know."""
    return next((row for row in _table if row.name == name), None)


def row_of(name: str) -> BackendRow:
    """The row of a backend. Raises UsageError for a name that has none."""
    row = find_row(name)
    if row is None:
        names = ", ".join((AUTO, *(row.name for row in _table)))
        raise UsageError(f"backend {name!r} is unknown", hint=f"take {names}")
    return row


@contextmanager
def registered(row: BackendRow) -> Iterator[None]:
    """One backend more, preferred over the others, inside a `with` block."""
    if find_row(row.name) is not None:
        raise UsageError(f"backend {row.name!r} is in the table already", hint="give it another name")
    _table.insert(0, row)
    try:
        yield
    finally:
        _table.remove(row)


def is_graph(artifact: Artifact) -> bool:
    """Whether an artifact's file is the stage's ONNX graph. What an unknown backend reads is not taken for one."""
    row = find_row(artifact.backend)
    return row is not None and not row.builds_engines


def backend_names() -> tuple[str, ...]:
    """What `--backend` of a verb that loads a bundle may be: "auto", graphs, then engines."""
    return (AUTO, *(row.name for row in reversed(_table)))


def build_backends() -> tuple[str, ...]:
    """What `--backend` of a build may be: graphs alone, or engines besides."""
    return (GRAPH_BACKEND, *(row.name for row in reversed(_table) if row.builds_engines))


def provider_names() -> tuple[str, ...]:
    """What `--provider` may be."""
    return (AUTO, *dict.fromkeys(provider for row in _table for provider in row.providers))


def available_backends() -> dict[Backend, str]:
    """Backends that can run on this machine, the preferred first, each with the reason."""
    return {row.name: _reason(row) for row in _table if not row.lack(row)}


def missing(backend: Backend) -> str:
    """What this machine lacks to run a backend, with the command that helps; "" if nothing."""
    row = row_of(backend)
    return row.lack(row)


def library_version(backend: Backend) -> str | None:
    """Version of the library that runs a backend's artifacts, None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    for package in row_of(backend).packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _reason(row: BackendRow) -> str:
    from ditc.runtime.gpu import find_gpu

    gpu = find_gpu() if row.same_gpu else None
    if gpu is None:
        return f"{row.title} is installed"
    return f"{gpu.name} ({gpu.sm}), {row.name} {library_version(row.name)}"
