"""What `ditc doctor` finds about GPUs and engines: the GPU and its target, and known defects of the libraries."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ditc.runtime.commands.doctor_finding import Finding
from ditc.runtime.gpu import RTX_LIBRARY, Gpu, driver_version, find_gpu, find_gpus, no_gpu, rtx_library_folder
from ditc.runtime.sessions.onnxruntime_cuda import INSTALL, cuda_lack
from ditc.runtime.sessions.registry import library_version, missing, rows
from ditc.runtime.spec import Backend

# Package, prefix of the version, its defect, and the hint. Sources: NVIDIA's release notes of these versions.
KNOWN_BAD = (
    (
        "tensorrt",
        "11.3.0",
        "refitting an engine built with REFIT can drop the bias of a matrix product (release notes 11.3.0)",
        "ditc builds with REFIT_IDENTICAL, which is not affected; for other programs, pip install 'tensorrt>=11.4'",
    ),
    ("tensorrt", "10.", "its networks are not strongly typed by default", "pip install 'tensorrt>=11'"),
    (
        "tensorrt-rtx",
        "1.4",
        "versions from 1.5 on cannot load its engines (ABI break)",
        "pip install 'tensorrt-rtx>=1.7.1'",
    ),
)


def engine_findings() -> list[Finding]:
    """All findings about GPUs and engines."""
    gpu = find_gpu()
    return [
        *_gpu(gpu),
        *_gpu_list(),
        *_targets(),
        *_runs(),
        *_onnxruntime(gpu),
        *_openvino(),
        *_plugin(),
        *known_bad(),
        *missing_link(rtx_library_folder()),
    ]


def _gpu(gpu: Gpu | None) -> list[Finding]:
    if gpu is None:
        anywhere = ", ".join(row.name for row in rows() if row.targets)
        return [Finding("gpu", f"none: engines can be built here ({anywhere}) but not run: {no_gpu()}", None)]
    name, driver = f"{gpu.name}, {gpu.sm}", f"driver {driver_version() or 'unknown'}"
    engines = [row for row in reversed(rows()) if row.same_gpu]
    serving = [row.name for row in engines if row.built_on_gpu or gpu.sm in row.targets]
    others = [row.name for row in engines if row.name not in serving]
    if not others:
        return [Finding("gpu", f"{name}: supported by {' and '.join(serving)}; {driver}")]
    hint = f"build engines for it on this machine, with --backend {' or '.join(serving)}"
    return [Finding("gpu", f"{name}: not supported by {' and '.join(others)}; {driver}", None, hint)]


def _gpu_list() -> list[Finding]:
    """The GPUs as CUDA numbers them, for --device."""
    return [
        Finding(f"gpu {number}", f"{gpu.name}, {gpu.sm}, {gpu.memory_bytes / 1e9:.0f} GB, {gpu.uuid}", None)
        for number, gpu in enumerate(find_gpus())
    ]


def _targets() -> list[Finding]:
    """For each installed library that builds engines, what it can build them for here."""
    found = []
    for row in reversed(rows()):
        installed = library_version(row.name) if row.builds_engines else None
        if installed is not None:
            what = ", ".join(row.targets) or (
                "the GPU of this machine" if row.built_on_gpu else "any machine"
            )
            found.append(Finding("builds", f"{row.name} {installed} for {what}"))
    return found


def _runs() -> list[Finding]:
    """Backends that cannot run here, each with the first thing that it lacks. `doctor.py` lists those that can."""
    return [
        Finding("cannot run", f"{row.name}: {lack}", None) for row in rows() if (lack := missing(row.name))
    ]


def _onnxruntime(gpu: Gpu | None) -> list[Finding]:
    """Whether ONNX Runtime can run on the GPU; nothing if there is neither a GPU nor onnxruntime-gpu."""
    if gpu is None and _version("onnxruntime-gpu") is None:
        return []
    lack = cuda_lack()
    if lack:
        return [Finding("cannot run", f"onnxruntime on a GPU: {lack}", None, INSTALL if gpu else None)]
    return [Finding("runs", "onnxruntime on the GPU, with its CUDA provider")]


def _openvino() -> list[Finding]:
    """What OpenVINO can compute on, for --device; nothing if it is not installed."""
    if missing(Backend.OPENVINO):
        return []
    from ditc.runtime.sessions.openvino_library import core

    found = ", ".join(core().available_devices)
    if not found:
        return [
            Finding(
                "cannot run", "openvino: it finds no device, not even a CPU", False, "pip install openvino"
            )
        ]
    return [Finding("runs", f"openvino on {found}, which --device chooses; ditc was tried on the CPU only")]


def _plugin() -> list[Finding]:
    """Whether --linear-attention plugin can be built."""
    triton = _version("triton")
    if triton is None:
        hint = 'pip install "ditc[plugin]"; only --linear-attention plugin needs it'
        return [Finding("plugin", "triton is not installed", None, hint)]
    return [Finding("plugin", f"triton {triton} can compile the linear-attention kernels")]


def known_bad() -> list[Finding]:
    """Installed versions that have a known defect."""
    return [
        Finding("conflict", f"{package} {installed}: {what}", False, hint)
        for package, prefix, what, hint in KNOWN_BAD
        if (installed := _version(package)) is not None and installed.startswith(prefix)
    ]


def missing_link(libraries: Path | None) -> list[Finding]:
    """Whether libtensorrt_rtx.so is missing: the parser opens it for plugins, but the wheel has only ...so.1."""
    if libraries is None or os.name == "nt" or (libraries / RTX_LIBRARY).exists():
        return []
    link = libraries / RTX_LIBRARY
    text = f"{link} is missing, which TensorRT-RTX's parser opens for plugins"
    hint = f"--linear-attention plugin makes this link by itself; by hand: ln -s {RTX_LIBRARY}.1 {link}"
    return [Finding("rtx link", text, None, hint)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
