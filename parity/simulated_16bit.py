"""Simulate 16-bit stages on a CPU: run their graphs with fp32 operations and a rounding to 16 bits after each.

ONNX Runtime's CPU provider cannot show 16-bit rounding itself: it computes fp16 graphs in fp32 and has no bf16.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from ditc.export.graph.passes.round_to import round_to, rounded_spec
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.sessions.onnxruntime import OnnxRuntimeSession
from ditc.runtime.spec import DType, Precision

DTYPES = {Precision.FP16: DType.FLOAT16, Precision.BF16: DType.BFLOAT16}


def open_rounded(model: Path, artifact: Artifact, *, threads: int = 0) -> tuple[OnnxRuntimeSession, ir.Model]:
    """A session that rounds as the artifact's precision does, and its graph for tracing.

    Raises:
        BuildError: the graph has nothing to round.
        SessionError: ONNX Runtime refuses the rounded graph.
    """
    rounded = round_to(ir.load(model), DTYPES[artifact.precision])
    with tempfile.TemporaryDirectory(prefix="ditc-rounded-") as folder:
        path = Path(folder) / "rounded.onnx"
        ir.save(rounded, path, external_data="rounded.data")
        session = OnnxRuntimeSession(path, rounded_spec(artifact.spec), threads=threads)
    return session, rounded
