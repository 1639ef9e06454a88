"""The table of backends: one row per backend, in order of preference.

A new backend is one file beside this one and one row here. All other code, from the loader to the benchmarks, reads the
rows and never compares a backend's name. A backend's file is imported only when one of its functions is called, and
NumPy is not imported here: the options of the command line are made from this table and must be fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditc.runtime.errors import UsageError
from ditc.runtime.spec import Backend, Precision

if TYPE_CHECKING:
    from ditc.runtime.bench.profile import ProfiledSession
    from ditc.runtime.bundle.manifest import Artifact
    from ditc.runtime.bundle.references import Reference
    from ditc.runtime.load_options import LoadOptions
    from ditc.runtime.session import Array, Session
    from ditc.runtime.sessions.device import Device

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonForm:
    """How Triton Inference Server opens an artifact.

    Attributes:
        backend: Triton's name of the library.
        file: the name under which it looks for the model.
        data: the name of the model's data file; "" if the model refers to its data files by their own names.
        kind: where instances must run, CPU or GPU; "" leaves the choice.
        threads: the parameter with the number of threads per instance; "" if there is none.
        foreign: lists the operators of a model that the library does not know; None if it holds none.
    """

    backend: str
    file: str
    data: str = ""
    kind: str = ""
    threads: str = ""
    foreign: Callable[[Path], Sequence[str]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRow:
    """Everything that ditc has to know about a backend.

    Attributes:
        name: its name in manifests, in `--backend` and in the names of engine files.
        title: the library's own name, for messages.
        packages: alternative Python packages with the library. The library's version is
            that of the first one that is installed.
        needs: further Python packages, all of which it needs.
        extra: the extra in pyproject.toml that installs these packages; None if ditc itself requires them.
        lack: says in one line what this machine lacks to run it, with the command that helps; "" if it can run.
        open: opens a stage. It is called after `lack` and after the check that the artifact is for this machine.
        profile: opens a stage with the library's profiler on, as a `ProfiledSession` (bench/profile.py). None if it has
            none.
        open_changed: opens a stage with other values of some initializers of its graph, given by name; bf16 values as
            uint16 arrays of their bits, FP8 ones as uint8 arrays. None if it cannot.
        takes_loras: whether, with these options, its sessions have the inputs for LoRAs that a graph of `ditc build
            --lora-inputs` has. None if they never do.
        needs_refit: whether `open_changed` opens only engines that were built with `--refit`.
        references: reads which other files an artifact's file refers to, and that the library will open by itself. They
            are held against the manifest before the artifact is opened. None if such files refer to no others.
        builds_engines: whether it runs what a build makes from the stage's ONNX graph: engines, or another form of the
            graph. Otherwise it runs the graph itself.
        same_library: whether an engine runs only with the version of the library that built it.
        same_gpu: whether an engine runs only on the NVIDIA GPU, or the kinds of GPU, that it was built for. The
            sessions of a bundle then share one CUDA device. Where this is false, what a build makes runs anywhere.
        built_on_gpu: whether its builder times kernels and so must run on the GPU that the engine is for. Otherwise any
            machine can build engines.
        targets: compute capabilities that engines can be built for; empty if engines are built for the machine itself.
        providers: the values of `--provider` that this backend accepts, except "auto".
        devices: the values of `--device` that this backend accepts, in upper case; empty for those of NVIDIA's GPUs.
        precisions: the precisions that a build can make for it.
        base_precision: the precision of a build for 8 bits outside of the 8-bit products, unless it is named.
        why_later: says in one line why "auto" takes another backend of the same precision first on this machine; "" if
            this one keeps its place in the order. None if it always does.
        cannot: says in one line why it cannot run an artifact on this machine at all, though it runs others; "" if it
            can. None if it runs all.
        polygraphy: the command of NVIDIA's Polygraphy that runs an artifact. `{model}` stands for the artifact's file.
            "" if Polygraphy cannot run it.
        triton: how Triton Inference Server opens an artifact; None if it cannot.
    """

    name: Backend
    title: str
    packages: tuple[str, ...]
    needs: tuple[str, ...] = ()
    extra: str | None = None
    lack: Callable[[BackendRow], str]
    open: Callable[[BackendRow, Path, Artifact, LoadOptions, Device | None], Session]
    references: Callable[[Path], Sequence[Reference]] | None
    profile: Callable[[BackendRow, Path, Artifact, LoadOptions, Device | None], ProfiledSession] | None = None
    open_changed: (
        Callable[[BackendRow, Path, Artifact, LoadOptions, Device | None, Mapping[str, Array]], Session]
        | None
    ) = None
    takes_loras: Callable[[LoadOptions], bool] | None = None
    needs_refit: bool = False
    builds_engines: bool = False
    same_library: bool = False
    same_gpu: bool = False
    built_on_gpu: bool = False
    targets: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = tuple(Precision)
    base_precision: Precision = Precision.FP32
    why_later: Callable[[BackendRow], str] | None = None
    cannot: Callable[[Artifact], str] | None = None
    polygraphy: str = ""
    triton: TritonForm | None = None

    @property
    def install(self) -> str:
        """The command that installs its packages."""
        return "pip install ditc" if self.extra is None else f'pip install "ditc[{self.extra}]"'


def _imported_later(module: str, function: str) -> Callable[..., Any]:
    """A function of a module. The module is imported when the function is called for the first time."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments)

    return call


# The members of tensorrt_rtx.ComputeCapability in 1.7.1. There is no sm90 and no sm100; on such a GPU the library says:
# "TensorRT-RTX does not support this compute capability, so the engine cannot be rebuilt for it".
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")

# Engines have their scales from a build. What a token's own scale costs or gains there was not measured.
ENGINE_PRECISIONS = tuple(p for p in Precision if p is not Precision.INT8_DYNAMIC)

_TENSORRT, _ONNXRUNTIME = "ditc.runtime.sessions.tensorrt_backend", "ditc.runtime.sessions.onnxruntime"
_PROFILERS = "ditc.runtime.bench.profilers"
_OPENVINO, _OPENVINO_LIBRARY = "ditc.runtime.sessions.openvino", "ditc.runtime.sessions.openvino_library"

# Engines come first, because they make the best use of a GPU. TensorRT comes before TensorRT-RTX: if a bundle has
# engines of both for this machine, those of TensorRT were tuned on this very GPU. OpenVINO comes before ONNX Runtime,
# because it is faster on CPUs, and `why_later` says on which machines it is not.
_table: list[BackendRow] = [
    BackendRow(
        name=Backend.TENSORRT,
        title="TensorRT",
        packages=("tensorrt",),
        needs=("cuda-python",),
        extra="tensorrt",
        lack=_imported_later(_TENSORRT, "lack"),
        open=_imported_later(_TENSORRT, "open_stage"),
        references=None,  # an engine holds its weights
        profile=_imported_later(f"{_PROFILERS}.tensorrt", "open_profiled"),
        open_changed=_imported_later(_TENSORRT, "open_changed"),
        needs_refit=True,
        builds_engines=True,
        same_library=True,  # version compatibility is an option of TensorRT's builder, which ditc does not set
        same_gpu=True,
        built_on_gpu=True,
        precisions=ENGINE_PRECISIONS,
        base_precision=Precision.FP16,
        polygraphy="polygraphy run {model} --trt --model-type engine",
        triton=TritonForm(backend="tensorrt", file="model.plan", kind="GPU"),
    ),
    BackendRow(
        name=Backend.TENSORRT_RTX,
        title="TensorRT-RTX",
        packages=("tensorrt-rtx",),
        needs=("cuda-python",),
        extra="rtx",
        lack=_imported_later(_TENSORRT, "lack"),
        open=_imported_later(_TENSORRT, "open_stage"),
        references=None,  # an engine holds its weights
        profile=_imported_later(f"{_PROFILERS}.tensorrt", "open_profiled"),
        open_changed=_imported_later(_TENSORRT, "open_changed"),
        needs_refit=True,
        builds_engines=True,
        same_library=True,  # TensorRT-RTX 1.7.1 has no version compatibility
        same_gpu=True,
        targets=RTX_TARGETS,
        precisions=ENGINE_PRECISIONS,
        base_precision=Precision.FP16,
        polygraphy="POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run {model} --trt --model-type engine",
    ),
    BackendRow(
        name=Backend.OPENVINO,
        title="OpenVINO",
        packages=("openvino",),
        extra="openvino",
        lack=_imported_later(_OPENVINO_LIBRARY, "lack"),
        open=_imported_later(_OPENVINO, "open_stage"),
        references=_imported_later("ditc.runtime.bundle.ir_references", "ir_references"),
        profile=_imported_later(f"{_PROFILERS}.openvino", "open_profiled"),
        open_changed=_imported_later(_OPENVINO, "open_changed"),
        takes_loras=_imported_later(_OPENVINO, "takes_loras"),
        builds_engines=True,
        devices=("CPU", "GPU", "NPU"),
        precisions=(Precision.FP32, Precision.BF16, Precision.INT8_DYNAMIC, Precision.INT8),
        base_precision=Precision.BF16,
        why_later=_imported_later(_OPENVINO_LIBRARY, "why_later"),
        triton=TritonForm(backend="openvino", file="model.xml", data="model.bin", kind="CPU"),
    ),
    BackendRow(
        name=Backend.ONNXRUNTIME,
        title="ONNX Runtime",
        packages=("onnxruntime", "onnxruntime-gpu"),
        lack=_imported_later(_ONNXRUNTIME, "lack"),
        open=_imported_later(_ONNXRUNTIME, "open_stage"),
        references=_imported_later("ditc.runtime.bundle.onnx_references", "onnx_references"),
        profile=_imported_later(f"{_PROFILERS}.onnxruntime", "open_profiled"),
        open_changed=_imported_later(_ONNXRUNTIME, "open_changed"),
        takes_loras=_imported_later(_ONNXRUNTIME, "takes_loras"),
        providers=("cpu", "cuda"),
        cannot=_imported_later(_ONNXRUNTIME, "cannot"),
        polygraphy="polygraphy run {model} --onnxrt",
        triton=TritonForm(
            backend="onnxruntime",
            file="model.onnx",
            threads="intra_op_thread_count",
            foreign=_imported_later("ditc.runtime.bundle.onnx_domains", "foreign_operators"),
        ),
    ),
]

# The backend that runs ONNX graphs. Every build makes them, and engines are built from them.
GRAPH_BACKEND = Backend.ONNXRUNTIME


def rows() -> tuple[BackendRow, ...]:
    """All backends, in order of preference."""
    return tuple(_table)


def find_row(name: str) -> BackendRow | None:
    """The row of a backend; None if this version of ditc does not know it."""
    return next((row for row in _table if row.name == name), None)


def row_of(name: str) -> BackendRow:
    """The row of a backend. Raises UsageError if there is none with this name."""
    row = find_row(name)
    if row is None:
        names = ", ".join((AUTO, *(row.name for row in _table)))
        raise UsageError(f"backend {name!r} is unknown", hint=f"choose one of {names}")
    return row


@contextmanager
def registered(row: BackendRow) -> Iterator[None]:
    """Add a backend to the table, as the preferred one, for the duration of a `with` block."""
    if find_row(row.name) is not None:
        raise UsageError(f"backend {row.name!r} is already in the table", hint="give it another name")
    _table.insert(0, row)
    try:
        yield
    finally:
        _table.remove(row)


def is_graph(artifact: Artifact) -> bool:
    """Whether an artifact's file is the stage's ONNX graph. Artifacts of unknown backends do not count as graphs."""
    row = find_row(artifact.backend)
    return row is not None and not row.builds_engines


def backend_names() -> tuple[str, ...]:
    """The values of `--backend` for verbs that load a bundle: "auto", the graphs' backend, then those for engines."""
    return (AUTO, *(row.name for row in reversed(_table)))


def build_backends() -> tuple[str, ...]:
    """The values of `--backend` for builds: graphs alone, or a backend whose engines are built in addition."""
    return (GRAPH_BACKEND, *(row.name for row in reversed(_table) if row.builds_engines))


def provider_names() -> tuple[str, ...]:
    """The values of `--provider`."""
    return (AUTO, *dict.fromkeys(provider for row in _table for provider in row.providers))


def device_names() -> tuple[str, ...]:
    """The values of `--device` that are not NVIDIA GPUs."""
    return tuple(dict.fromkeys(name for row in _table for name in row.devices))


def available_backends() -> dict[Backend, str]:
    """The backends that can run on this machine, in order of preference, each with the reason why it can."""
    return {row.name: _reason(row) for row in _table if not row.lack(row)}


def missing(backend: Backend) -> str:
    """What this machine lacks to run a backend, with the command that helps; "" if it lacks nothing."""
    row = row_of(backend)
    return row.lack(row)


def library_version(backend: Backend) -> str | None:
    """The version of the library that runs a backend's artifacts; None if it is not installed."""
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
