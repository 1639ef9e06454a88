"""Build a bundle from a checkpoint. Finished stages are reused by key, and the manifest is replaced last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from ditc.export.build import noop, previous_build
from ditc.export.build.assemble import assemble
from ditc.export.build.build_key import digest
from ditc.export.build.context import BuildContext
from ditc.export.build.default_request import check_default_request
from ditc.export.build.engine_artifact import engine_artifact
from ditc.export.build.events import BuildEvent, BuildReport, EventLog
from ditc.export.build.graph_artifact import graph_artifact, graph_precision, stage_inputs
from ditc.export.build.ir_artifact import ir_artifact
from ditc.export.build.journal import Journal, as_ditc_error, check_bundle_or_empty, check_writable, locked
from ditc.export.build.preflight import check_options, check_weights
from ditc.export.build.records import StageInputs, StageRecord
from ditc.export.checkpoint.controlnet import open_joined
from ditc.export.checkpoint.loras import read_choices, with_loras
from ditc.export.contract import BuildOptions, ModelPlan
from ditc.export.engine.build import library_version
from ditc.export.engine.targets import check_targets, default_targets
from ditc.export.families import find_family
from ditc.export.quant.apply import Quantization, check_layers, prepare, with_base_precisions
from ditc.runtime.bundle.manifest import MANIFEST, Artifact, Manifest, load_manifest, save_manifest, sealed
from ditc.runtime.errors import BuildError
from ditc.runtime.sessions.registry import GRAPH_BACKEND
from ditc.runtime.spec import Precision

__all__ = ["BuildEvent", "BuildReport", "build_bundle"]


def build_bundle(
    source: str | Path,
    out: Path,
    options: BuildOptions,
    *,
    key: Any = None,
    on_event: Callable[[BuildEvent], None] = lambda event: None,
) -> BuildReport:
    """Build the bundle in `out`, or bring it up to date.

    An error leaves an existing bundle as it was.

    Args:
        source: a diffusers directory.
        key: the private key of a build whose bundle will be signed. What earlier builds left is then used only if a
            build with this key made it.
        on_event: called with each event as it happens, for a progress line.

    Raises:
        UsageError: an option has a value that is not supported, or a LoRA does not fit the checkpoint.
        CheckpointError: the checkpoint is incomplete or damaged.
        BuildError, BundleError: a stage cannot be built.
        OutputError: `out` cannot be written.
    """
    started = perf_counter()
    check_options(options)
    check_bundle_or_empty(out)
    plain = open_joined(source, variant=options.variant, controlnet=options.controlnet)
    family = find_family(plain)
    adapter, native_names = family.adapter, family.native_names(plain)
    checkpoint = with_loras(plain, read_choices(options.loras, plain, native_names))
    plan = adapter.plan(checkpoint, options)
    check_default_request(plan)
    quantizations = prepare(options, checkpoint, plan)
    plan = with_base_precisions(plan, quantizations, adapter, checkpoint, options)
    check_layers(quantizations, adapter, checkpoint, plan, options)
    targets = _checked_targets(options, plan, quantizations)
    check_writable(out)
    journal = Journal(out, key)
    with locked(out):
        previous = previous_build.existing(out)
        counts = previous is not None and journal.counts(previous)
        build = BuildContext(
            checkpoint=checkpoint,
            adapter=adapter,
            native_names=native_names,
            plan=plan,
            options=options,
            out=out,
            old=previous if counts else None,
            targets=targets,
            quantizations=quantizations,
            journal=journal,
            events=EventLog(on_event),
        )
        if previous is not None and not counts:
            _check_nothing_is_lost(build, previous)
        try:
            manifest = _build(build, previous)
        except OSError as e:
            raise as_ditc_error(e, out) from e
        report = BuildReport(
            bundle=out,
            manifest=manifest,
            events=tuple(build.events.events),
            seconds=perf_counter() - started,
            dropped=previous_build.dropped(previous, manifest),
        )
        noop.remember(build.journal, checkpoint.path, options, report)
    return report


def _checked_targets(
    options: BuildOptions, plan: ModelPlan, quantizations: Mapping[str, Quantization]
) -> tuple[str, ...]:
    """The targets of the engines, () where none are built.

    A missing library and a target that lacks a stage's precision are reported here, before the export starts.
    """
    if not options.builds_engines:
        return ()
    library_version(options.backend)
    eight = [quantization.precision for quantization in quantizations.values()]
    decides = Precision.FP8 if Precision.FP8 in eight else options.precision  # the fewest targets have it
    targets = options.targets or default_targets(options.backend, decides)
    for precision in (options.precision, *eight, *(stage.precision for stage in plan.stages.values())):
        check_targets(options.backend, targets, precision)
    return targets


def _check_nothing_is_lost(build: BuildContext, previous: Manifest) -> None:
    """Refuse a build that signs where it would remove artifacts that it does not make itself and cannot vouch for."""
    made = {
        (name, graph_precision(build, name).value, backend.value)
        for name in build.plan.stages
        for backend in {GRAPH_BACKEND, build.options.backend}
    }
    lost = [" ".join(slot) for slot in previous_build.slots(previous) if slot not in made]
    if lost:
        raise BuildError(
            f"{build.out} holds {', '.join(lost)} of builds that did not sign with this key, and a build that signs "
            "keeps only what it can vouch for",
            hint="build into a new directory; or, if you trust what is there, build without --sign and then sign all "
            f"of it: ditc sign {build.out} --key KEY.pem",
        )


def _build(build: BuildContext, previous: Manifest | None) -> Manifest:
    """Build all stages and the small files, replace the manifest in one move, then remove files it no longer names."""
    inputs = {name: stage_inputs(build, name) for name in build.plan.stages}
    _check_missing(build, inputs)
    graphs = {name: graph_artifact(build, name) for name in build.plan.stages}
    engines: dict[str, Artifact] = {}
    if build.options.builds_engines:
        engines = {name: engine_artifact(build, name, graph.artifact) for name, graph in graphs.items()}
    if build.options.converts_graphs:
        engines = {name: ir_artifact(build, name, graph.artifact) for name, graph in graphs.items()}
    _check_unchanged(build, inputs)
    build.journal.hashes.save()
    manifest = assemble(build, graphs, engines)
    if build.old is None or digest(manifest) != digest(previous_build.without_digest(build.old)):
        save_manifest(manifest, build.out)
    made, manifest = sealed(manifest).digest, load_manifest(build.out)
    if manifest.digest != made:
        raise BuildError(f"{build.out / MANIFEST} was changed during the build", hint="build again")
    previous_build.sweep(build.out, previous, manifest, build.journal)
    return manifest


def _check_missing(build: BuildContext, inputs: Mapping[str, StageInputs]) -> None:
    """Check weights, free disk space and memory for the stages that are not finished yet, before the first export."""
    missing = [
        name for name, made_from in inputs.items() if not build.journal.finished(StageRecord, made_from)
    ]
    if missing:
        check_weights(
            build.checkpoint,
            build.adapter,
            build.plan,
            build.options,
            build.out,
            missing,
            build.events.working,
        )


def _check_unchanged(build: BuildContext, inputs: Mapping[str, StageInputs]) -> None:
    """Refuse a checkpoint that changed during the build.

    Stages of two versions of a checkpoint would each be correct, but together they would draw noise.
    """
    for name, stage in build.plan.stages.items():
        if stage_inputs(build, name) != inputs[name]:
            raise BuildError(
                f"{build.checkpoint.path}: {' and '.join(stage.components)} changed while it was being built",
                hint="build again once the checkpoint is complete; finished stages are reused",
            )
