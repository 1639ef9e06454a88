"""Backends, in order of preference, and how to open one. A new backend is one file here and one row below."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ditc.runtime.errors import SessionError
from ditc.runtime.gpu import check_engine, find_gpu, library_version
from ditc.runtime.manifest import Artifact
from ditc.runtime.session import Session
from ditc.runtime.spec import Backend


def available_backends() -> dict[Backend, str]:
    """Backends that can run on this machine, best first, each with the reason."""
    backends: dict[Backend, str] = {}
    if find_spec("onnxruntime") is not None:
        backends[Backend.ONNXRUNTIME] = "ONNX Runtime is installed"
    return backends


def open_session(model: Path, artifact: Artifact, *, threads: int = 0) -> Session:
    """A session for the artifact's backend.

    Raises:
        SessionError: the backend cannot run here or cannot load the file.
    """
    if artifact.backend is Backend.ONNXRUNTIME:
        from ditc.runtime.sessions.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(model, artifact.spec, precision=artifact.precision, threads=threads)
    check_engine(artifact, gpu=find_gpu(), library=library_version(artifact.backend))
    raise SessionError(
        f"{artifact.spec.name}: {artifact.backend.value} engines do not run on this machine",
        hint="run the ONNX Runtime artifact: --backend onnxruntime",
    )
