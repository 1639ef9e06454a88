"""One stage in OpenVINO's form in a bundle: reused if nothing that it depends on has changed, else written anew."""

from __future__ import annotations

from ditc.export.build.build_key import digest
from ditc.export.build.context import BuildContext
from ditc.export.build.engine_artifact import made_artifact
from ditc.export.build.layout import ir_path
from ditc.export.build.records import EngineInputs
from ditc.export.build.source_hash import engine_source
from ditc.export.engine.ir import estimate_memory_bytes, write_ir
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.sessions.openvino import weights_path
from ditc.runtime.sessions.registry import library_version


def ir_inputs(build: BuildContext, name: str, graph: Artifact) -> EngineInputs:
    """Everything that the stage's files depend on. What only engines depend on has its default."""
    options = build.options
    return EngineInputs(
        stage=name,
        graph=graph.key,
        backend=options.backend,
        targets=(),
        profiles=(),
        library_version=library_version(options.backend) or "",
        gpu=None,
        linear_attention=options.linear_attention,
        weight_streaming=options.weight_streaming,
        refit=False,
        engine_source=engine_source(),
    )


def ir_artifact(build: BuildContext, name: str, graph: Artifact) -> Artifact:
    """A finished graph in OpenVINO's form. An earlier build's is reused if its inputs are the same."""
    inputs = ir_inputs(build, name, graph)
    path = ir_path(build.out, name, graph.precision, digest(inputs))

    return made_artifact(
        build,
        name,
        graph,
        inputs,
        stage=f"{name} {build.options.backend}",
        files=(path, weights_path(path)),
        memory_bytes=estimate_memory_bytes,
        make=lambda onnx: write_ir(onnx, path, spec=graph.spec, precision=graph.precision),
    )
