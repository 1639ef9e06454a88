"""One stage's engine in a bundle: reused if nothing that it depends on has changed, else built from the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ditc.export.build import estimates
from ditc.export.build.build_key import digest
from ditc.export.build.context import BuildContext
from ditc.export.build.layout import engine_path
from ditc.export.build.records import EngineInputs, EngineRecord
from ditc.export.build.source_hash import engine_source
from ditc.export.checkpoint.release_memory import release_memory
from ditc.export.engine.build import EngineReport, build_engine, estimate_memory_bytes, library_version
from ditc.export.engine.ir import IrReport
from ditc.export.engine.plugins import has_linear_attention
from ditc.export.engine.profiles import orientation_profiles
from ditc.export.engine.refittable import refittable_weights
from ditc.runtime.bundle.build_cost import BuildCost
from ditc.runtime.bundle.integrity import file_ref
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.gpu import find_gpu
from ditc.runtime.sessions.registry import row_of
from ditc.runtime.spec import CONDITIONER, DENOISER, Precision


def engine_inputs(build: BuildContext, name: str, graph: Artifact) -> EngineInputs:
    """Everything that the stage's engine depends on."""
    options = build.options
    return EngineInputs(
        stage=name,
        graph=graph.key,
        backend=options.backend,
        targets=build.targets,
        profiles=orientation_profiles(graph.spec, build.plan.defaults, options.backend),
        library_version=library_version(options.backend),
        gpu=find_gpu() if row_of(options.backend).built_on_gpu else None,
        linear_attention=_linear_attention(build, graph),
        weight_streaming=options.weight_streaming,
        refit=_can_have_loras(build, name) and options.refit,
        engine_source=engine_source(),
    )


def engine_artifact(build: BuildContext, name: str, graph: Artifact) -> Artifact:
    """The engine of a finished graph for all targets. An earlier build's is reused if its inputs are the same."""
    inputs, stage, options = engine_inputs(build, name, graph), f"{name} engine", build.options
    path = engine_path(build.out, name, graph.precision, options.backend, digest(inputs))

    def make(onnx: Path) -> EngineReport:
        return build_engine(
            onnx,
            path,
            spec=graph.spec,
            backend=options.backend,
            targets=inputs.targets,
            profiles=inputs.profiles,
            timing_cache=build.journal.timing_cache,
            tf32=graph.precision is Precision.TF32,
            linear_attention=options.linear_attention,
            weight_streaming=options.weight_streaming,
            refit=refittable_weights(onnx) if inputs.refit else (),
            progress=lambda phase, step, steps: build.events.working(stage, f"{phase} {step}/{steps}"),
        )

    return made_artifact(
        build, name, graph, inputs, stage=stage, files=(path,), memory_bytes=estimate_memory_bytes, make=make
    )


def _linear_attention(build: BuildContext, graph: Artifact) -> str:
    """How the engine computes linear attention: a graph without it gives the same engine for each value."""
    chosen = build.options.linear_attention
    if chosen == "plugin" and not has_linear_attention(build.out / graph.file.path):
        return "decomposed"
    return chosen


def _can_have_loras(build: BuildContext, name: str) -> bool:
    """Whether LoRAs change weights of the stage: they do not change a VAE's."""
    return name in (CONDITIONER, DENOISER, *(spec.stage for spec in build.plan.text))


def made_artifact(
    build: BuildContext,
    name: str,
    graph: Artifact,
    inputs: EngineInputs,
    *,
    stage: str,
    files: Sequence[Path],
    memory_bytes: Callable[[Path], int],
    make: Callable[[Path], EngineReport | IrReport],
) -> Artifact:
    """The compiled form of a finished graph. An earlier build's is reused if its inputs are the same.

    Args:
        stage: what the build's events call it.
        files: what `make` writes: the file that is opened, and those that belong to it.
        memory_bytes: estimates the memory that `make` adds.
        make: compiles the graph in an ONNX file.
    """
    finished = build.journal.finished(EngineRecord, inputs)
    if finished is not None:
        build.events.reused(stage, finished.artifact)
        return finished.artifact
    why, onnx = build.journal.why(EngineRecord, inputs), build.out / graph.file.path
    release_memory(build.files_of(name))
    estimate = estimates.resident_bytes() + memory_bytes(onnx)
    build.events.building(stage, why)
    build.journal.will_write(*files)
    report = make(onnx)
    file, *data = (file_ref(path, build.out) for path in files)
    artifact = Artifact(
        spec=graph.spec,
        precision=graph.precision,
        backend=build.options.backend,
        targets=inputs.targets,
        file=file,
        data=tuple(data),
        weights=graph.weights,
        key=digest(inputs),
        recipe=graph.recipe,
        quantization=graph.quantization,
        library=inputs.library_version,
        gpu=inputs.gpu.name if inputs.gpu else None,
        refit=True if inputs.refit else None,
    )
    cost = BuildCost(
        seconds=report.seconds, peak_memory_bytes=report.peak_memory_bytes, estimated_memory_bytes=estimate
    )
    build.journal.write(EngineRecord(inputs=inputs, artifact=artifact, cost=cost))
    build.events.built(stage, why, artifact, cost)
    return artifact
