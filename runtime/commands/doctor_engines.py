"""What `ditc doctor` says about engines: the GPU and its target, the libraries' known defects."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ditc.runtime.commands.doctor_finding import Finding
from ditc.runtime.gpu import RTX_LIBRARY, RTX_TARGETS, Gpu, driver_version, find_gpu, rtx_library_folder
from ditc.runtime.sessions import ENGINES, missing
from ditc.runtime.sessions.onnxruntime_cuda import INSTALL, cuda_lack

# Package, version prefix, what happens, what to do. Sources: NVIDIA's release notes of the versions named.
KNOWN_BAD = (
    (
        "tensorrt",
        "11.3.0",
        "REFIT can drop a GEMM's bias (release notes 11.3.0)",
        "ditc sets REFIT_IDENTICAL, which is not affected; otherwise pip install 'tensorrt>=11.4'",
    ),
    ("tensorrt", "10.", "its networks are not strongly typed by default", "pip install 'tensorrt>=11'"),
    (
        "tensorrt-rtx",
        "1.4",
        "its engines are not those of 1.5 and later (ABI break)",
        "pip install 'tensorrt-rtx>=1.7.1'",
    ),
)


def engine_findings() -> list[Finding]:
    """All of it."""
    gpu = find_gpu()
    return [
        *_gpu(gpu),
        *_targets(),
        *_runs(),
        *_onnxruntime(gpu),
        *_plugin(),
        *known_bad(),
        *missing_link(rtx_library_folder()),
    ]


def _gpu(gpu: Gpu | None) -> list[Finding]:
    if gpu is None:
        return [Finding("gpu", "none: engines can be built here (tensorrt-rtx), not run", None)]
    name, driver = f"{gpu.name}, {gpu.sm}", f"driver {driver_version() or 'unknown'}"
    if gpu.sm in RTX_TARGETS:
        return [Finding("gpu", f"{name}: tensorrt-rtx and tensorrt serve it; {driver}")]
    hint = "build for it with --backend tensorrt, on this machine"
    return [Finding("gpu", f"{name}: not a target of tensorrt-rtx; {driver}", None, hint)]


def _targets() -> list[Finding]:
    found = []
    for package in ("tensorrt-rtx", "tensorrt"):
        installed = _version(package)
        if installed is not None:
            what = ", ".join(RTX_TARGETS) if package == "tensorrt-rtx" else "the GPU of this machine"
            found.append(Finding("builds", f"{package} {installed} for {what}"))
    return found


def _runs() -> list[Finding]:
    """Engine backends that cannot run here, each with the first thing that it lacks; doctor tells those that can."""
    return [
        Finding("runs not", f"{backend.value}: {lack}", None)
        for backend in ENGINES
        if (lack := missing(backend))
    ]


def _onnxruntime(gpu: Gpu | None) -> list[Finding]:
    """ONNX Runtime on the GPU, where there is one or the wheel for it."""
    if gpu is None and _version("onnxruntime-gpu") is None:
        return []
    lack = cuda_lack()
    if lack:
        return [Finding("runs not", f"onnxruntime on a GPU: {lack}", None, INSTALL if gpu else None)]
    return [Finding("runs", "onnxruntime on the GPU, by its CUDA provider")]


def _plugin() -> list[Finding]:
    """Whether --linear-attention plugin can be built."""
    triton = _version("triton")
    if triton is None:
        return [Finding("plugin", "triton is not installed", None, 'pip install "ditc[plugin]" (optional)')]
    return [Finding("plugin", f"triton {triton} compiles the linear-attention kernels")]


def known_bad() -> list[Finding]:
    """Installed versions with a defect that matters here."""
    return [
        Finding("conflict", f"{package} {installed}: {what}", False, hint)
        for package, prefix, what, hint in KNOWN_BAD
        if (installed := _version(package)) is not None and installed.startswith(prefix)
    ]


def missing_link(libraries: Path | None) -> list[Finding]:
    """The wheel ships libtensorrt_rtx.so.1 alone; the parser opens libtensorrt_rtx.so when it meets a plugin."""
    if libraries is None or os.name == "nt" or (libraries / RTX_LIBRARY).exists():
        return []
    hint = f"only for plugins; --linear-attention plugin makes it, or: ln -s {RTX_LIBRARY}.1 {libraries / RTX_LIBRARY}"
    return [
        Finding(
            "rtx link", f"{libraries / RTX_LIBRARY} is missing: a plugin would abort the process", None, hint
        )
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
