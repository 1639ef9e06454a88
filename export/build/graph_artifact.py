"""One stage's ONNX graph in a bundle: reused if nothing that it depends on has changed, else exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from ditc.export.build import estimates
from ditc.export.build.build_key import digest, tool_versions
from ditc.export.build.context import BuildContext
from ditc.export.build.latent_rgb import fit_latent_rgb
from ditc.export.build.layout import graph_path
from ditc.export.build.records import QuantizationInputs, StageInputs, StageRecord
from ditc.export.build.source_hash import graph_source
from ditc.export.build.weights import with_native_names
from ditc.export.checkpoint.release_memory import free_copies, release_memory
from ditc.export.contract import StageModule
from ditc.export.engine.memory import PeakMemory
from ditc.export.graph.onnx import OnnxFiles, data_path, to_onnx
from ditc.export.quant.apply import Quantization
from ditc.export.quant.plan import QuantPlan
from ditc.export.quant.record import quant_record_path, write_record
from ditc.runtime.bundle.build_cost import BuildCost
from ditc.runtime.bundle.integrity import file_ref
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.sessions.registry import GRAPH_BACKEND
from ditc.runtime.spec import CONDITIONER, DENOISER, VAE_ENCODER, Precision
from ditc.runtime.weight_map import weight_map_path, write_weight_map

# The stages that are made of the denoising network.
TRANSFORMER_STAGES = (CONDITIONER, DENOISER)


def stage_inputs(build: BuildContext, name: str) -> StageInputs:
    """Everything that the stage's graph depends on."""
    stage = build.plan.stages[name]
    components = [build.checkpoint.component(component) for component in stage.components]
    quantization = build.quantizations.get(name)
    facts = {**stage.facts, **({"lora_inputs": True} if has_lora_inputs(build, name) else {})}
    return StageInputs(
        stage=name,
        weights={c.name: build.journal.hashes.of_all(c.files) for c in components},
        config={c.name: digest(c.config) for c in components},
        facts={fact: json.dumps(value) for fact, value in facts.items()},
        shapes=stage.spec,
        precision=stage.precision,
        backend=GRAPH_BACKEND,
        opset=build.options.opset,
        quantization=None
        if quantization is None
        else QuantizationInputs(recipe=digest(quantization.recipe), ranges=quantization.ranges_sha256),
        export_source=graph_source(),
        tool_versions=tool_versions(),
        loras=tuple(
            f"{lora.sha256}:{lora.scale!r}"
            for lora in build.checkpoint.loras
            if not set(stage.components).isdisjoint(lora.components)
        ),
    )


def graph_artifact(build: BuildContext, name: str) -> StageRecord:
    """The record of the stage's graph. An earlier build's is reused if everything that it depends on is the same."""
    inputs = stage_inputs(build, name)
    finished = build.journal.finished(StageRecord, inputs)
    if finished is not None:
        build.events.reused(name, finished.artifact)
        return finished
    why = build.journal.why(StageRecord, inputs)
    build.events.building(name, why)
    started = perf_counter()
    key, quantization = digest(inputs), build.quantizations.get(name)
    precision = graph_precision(build, name)
    path = graph_path(build.out, name, precision, key)
    build.journal.will_write(path, data_path(path), weight_map_path(path), quant_record_path(path))
    with PeakMemory() as memory:
        module = build.adapter.load(build.checkpoint, build.plan, name, build.options)
        estimate = estimates.export_bytes(
            estimates.stage_size(
                module, build.plan.latents.scale_factor, build.plan.latents.frames_per_cell or 1
            )
        )
        plan = None if quantization is None else quantization.plan(module)
        files = to_onnx(
            module, path, quantize=plan, opset=build.options.opset, lora_inputs=has_lora_inputs(build, name)
        )
    if name in TRANSFORMER_STAGES:
        files = replace(files, weight_map=with_native_names(files.weight_map, build.native_names))
    artifact = _written(build.out, module, files, precision, key, quantization, plan)
    cost = BuildCost(
        seconds=perf_counter() - started,
        peak_memory_bytes=memory.peak_bytes,
        estimated_memory_bytes=estimate,
    )
    rgb = None
    if name == VAE_ENCODER:
        rgb = tuple(map(tuple, fit_latent_rgb(module.module, build.plan.latents).tolist()))
    free_copies(module.module, module.weights)
    del module
    release_memory(build.files_of(name))
    record = StageRecord(inputs=inputs, artifact=artifact, cost=cost, latent_rgb=rgb)
    build.journal.write(record)
    build.events.built(name, why, artifact, cost)
    return record


def has_lora_inputs(build: BuildContext, name: str) -> bool:
    """Whether the stage's graph takes LoRAs as inputs."""
    return build.options.lora_inputs and name in TRANSFORMER_STAGES


def graph_precision(build: BuildContext, name: str) -> Precision:
    """The precision of the stage's graph."""
    quantization = build.quantizations.get(name)
    return build.plan.stages[name].precision if quantization is None else quantization.precision


def _written(
    bundle: Path,
    module: StageModule,
    files: OnnxFiles,
    precision: Precision,
    key: str,
    quantization: Quantization | None,
    plan: QuantPlan | None,
) -> Artifact:
    """Write the files that lie beside the graph, and return the artifact that names them all."""
    record = None
    if quantization is not None and plan is not None:
        record = write_record(
            files.model,
            plan,
            module.spec,
            quantization.ranges_sha256,
            quantization.calibration,
            module.precision,
        )
    weight_map = write_weight_map(weight_map_path(files.model), files.weight_map)
    model, *data = (file_ref(path, bundle) for path in files.paths)
    return Artifact(
        spec=module.spec,
        precision=precision,
        backend=GRAPH_BACKEND,
        file=model,
        data=tuple(data),
        weights=file_ref(weight_map, bundle),
        key=key,
        recipe=None if quantization is None else quantization.recipe.name,
        quantization=None if record is None else file_ref(record, bundle),
    )
