"""What `ditc doctor` says about engines: the GPU and its target, the libraries' known defects."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ditc.runtime.commands.doctor_finding import Finding
from ditc.runtime.gpu import RTX_LIBRARY, Gpu, driver_version, find_gpu, rtx_library_folder
from ditc.runtime.sessions.onnxruntime_cuda import INSTALL, cuda_lack
from ditc.runtime.sessions.registry import library_version, missing, rows

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
        anywhere = ", ".join(row.name for row in rows() if row.targets)
        return [Finding("gpu", f"none: engines can be built here ({anywhere}), not run", None)]
    name, driver = f"{gpu.name}, {gpu.sm}", f"driver {driver_version() or 'unknown'}"
    engines = [row for row in reversed(rows()) if row.same_gpu]
    serving = [row.name for row in engines if row.built_on_gpu or gpu.sm in row.targets]
    others = [row.name for row in engines if row.name not in serving]
    if not others:
        return [Finding("gpu", f"{name}: {' and '.join(serving)} serve it; {driver}")]
    hint = f"build for it with --backend {' or '.join(serving)}, on this machine"
    return [Finding("gpu", f"{name}: not a target of {' and '.join(others)}; {driver}", None, hint)]


def _targets() -> list[Finding]:
    """What engines each installed library builds here."""
    found = []
    for row in reversed(rows()):
        installed = library_version(row.name) if row.builds_engines else None
        if installed is not None:
            what = (
                ", ".join(row.targets) or f"the {'GPU' if row.built_on_gpu else 'processor'} of this machine"
            )
            found.append(Finding("builds", f"{row.name} {installed} for {what}"))
    return found


def _runs() -> list[Finding]:
    """Backends that cannot run here, each with the first thing that it lacks; `doctor.py` tells those that can."""
    return [Finding("runs not", f"{row.name}: {lack}", None) for row in rows() if (lack := missing(row.name))]


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
