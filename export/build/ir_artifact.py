"""One stage in OpenVINO's form in a bundle: reused if nothing that it depends on has changed, else written anew."""

from __future__ import annotations

from ditc.export.build import estimates
from ditc.export.build.build_key import digest
from ditc.export.build.context import BuildContext
from ditc.export.build.layout import ir_path
from ditc.export.build.records import EngineInputs, EngineRecord
from ditc.export.build.source_hash import engine_source
from ditc.export.checkpoint.release_memory import release_memory
from ditc.export.engine.ir import estimate_memory_bytes, write_ir
from ditc.runtime.bundle.build_cost import BuildCost
from ditc.runtime.bundle.integrity import file_ref
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
        engine_source=engine_source(),
    )


def ir_artifact(build: BuildContext, name: str, graph: Artifact) -> Artifact:
    """A finished graph in OpenVINO's form. An earlier build's is reused if its inputs are the same."""
    inputs, stage = ir_inputs(build, name, graph), f"{name} {build.options.backend}"
    finished = build.journal.finished(EngineRecord, inputs)
    if finished is not None:
        build.events.reused(stage, finished.artifact)
        return finished.artifact
    why, onnx, key = build.journal.why(EngineRecord, inputs), build.out / graph.file.path, digest(inputs)
    release_memory(build.files_of(name))
    estimate = estimates.resident_bytes() + estimate_memory_bytes(onnx)
    build.events.building(stage, why)
    path = ir_path(build.out, name, graph.precision, key)
    build.journal.will_write(path, weights_path(path))
    report = write_ir(onnx, path, spec=graph.spec)
    artifact = Artifact(
        spec=graph.spec,
        precision=graph.precision,
        backend=build.options.backend,
        file=file_ref(report.model, build.out),
        data=(file_ref(report.weights, build.out),),
        weights=graph.weights,
        key=key,
        recipe=graph.recipe,
        quantization=graph.quantization,
        library=inputs.library_version,
    )
    cost = BuildCost(
        seconds=report.seconds,
        peak_memory_bytes=report.peak_memory_bytes,
        estimated_memory_bytes=estimate,
    )
    build.journal.write(EngineRecord(inputs=inputs, artifact=artifact, cost=cost))
    build.events.built(stage, why, artifact, cost)
    return artifact
