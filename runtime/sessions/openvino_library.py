"""The package `openvino`: imported without its reports, told what ditc needs of it, and what it lacks on a machine."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from ditc.runtime.errors import MissingExtra
from ditc.runtime.sessions.onnxruntime_cuda import cuda_lack
from ditc.runtime.sessions.registry import BackendRow, library_version
from ditc.runtime.spec import DType

# The oldest version that ditc was run with. An older one may refuse the files that a newer one writes.
OLDEST = (2026, 4)

# `import openvino` imports its converter, which reports the import to Google Analytics and keeps an id in ~/intel
# (2026.4). Without this package it does neither.
REPORTS = "openvino_telemetry"

# The package's names of element types.
TYPES = {
    DType.FLOAT32: "f32",
    DType.FLOAT16: "f16",
    DType.BFLOAT16: "bf16",
    DType.INT64: "i64",
    DType.BOOL: "boolean",
}


@cache
def load_openvino() -> Any:
    """The package, imported so that it cannot report its use: it does not find the package that would do it.

    Raises:
        MissingExtra: it is not installed.
    """
    hidden = REPORTS not in sys.modules
    if hidden:
        sys.modules[REPORTS] = None  # type: ignore[assignment]  # Python's own way to say "not importable"
    try:
        import openvino
    except ImportError as e:
        raise MissingExtra("openvino", "openvino") from e
    finally:
        if hidden:
            sys.modules.pop(REPORTS, None)
    return openvino


@cache
def core() -> Any:
    """OpenVINO's devices. One object serves the whole process."""
    return load_openvino().Core()


def lack(row: BackendRow) -> str:
    """What is missing: the package, or a version of it that is new enough; "" if stages can run here."""
    installed = library_version(row.name)
    if installed is None:
        return f"{row.title} is not installed: {row.install}"
    if _numbers(installed) < OLDEST:
        return f"{row.title} {installed} is too old: {row.install} takes {OLDEST[0]}.{OLDEST[1]} or newer"
    return ""


def why_later(row: BackendRow) -> str:
    """Why "auto" should take ONNX Runtime first on this machine; "" if OpenVINO is faster here, as measured."""
    from ditc.runtime.cpu_features import cpu_features

    if not cuda_lack():
        return "ONNX Runtime computes on the GPU"
    if "avx512f" not in cpu_features():
        return "OpenVINO was measured to be faster on CPUs with avx512f, which this one is not known to have"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[: len(OLDEST)]
    return tuple(int(part) for part in parts if part.isdecimal())
