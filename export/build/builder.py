"""Checkpoint to bundle: every stage content-addressed, finished ones reused, the manifest switched last."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ditc.export.build import estimates, noop, previous_build
from ditc.export.build.build_key import digest, source_hash, tool_versions
from ditc.export.build.events import BuildEvent, BuildReport, Status
from ditc.export.build.golden import write_golden
from ditc.export.build.journal import Journal, check_ours, check_writable, locked, unwritten, write_json
from ditc.export.build.latent_rgb import fit_latent_rgb
from ditc.export.build.preflight import check_options, check_weights, export_bytes
from ditc.export.checkpoint.open import Checkpoint, open_checkpoint
from ditc.export.checkpoint.release_memory import drop_pages
from ditc.export.checkpoint.tokenizer import write_tokenizer
from ditc.export.contract import Adapter, BuildOptions, ModelPlan, StageModule, StagePlan
from ditc.export.engine.build import build_engine, estimate_memory_bytes, library_version
from ditc.export.engine.memory import PeakMemory
from ditc.export.engine.profiles import orientation_profiles
from ditc.export.engine.targets import check_targets, default_targets
from ditc.export.families import find_adapter
from ditc.export.graph.onnx import to_onnx
from ditc.export.quant.apply import Quantization, prepare
from ditc.export.quant.record import write_record
from ditc.runtime.bundle.integrity import file_ref
from ditc.runtime.bundle.jsondata import from_json, to_json
from ditc.runtime.bundle.manifest import (
    SCHEMA_VERSION,
    Artifact,
    FileRef,
    GoldenTable,
    LatentSpec,
    Manifest,
    Stage,
    load_manifest,
    save_manifest,
)
from ditc.runtime.errors import BuildError
from ditc.runtime.gpu import find_gpu
from ditc.runtime.schedulers import coefficient_table
from ditc.runtime.sessions.registry import GRAPH_BACKEND, row_of
from ditc.runtime.spec import DENOISER, SIXTEEN_BITS, VAE_ENCODER, Precision

WEIGHTS = ".weights.json"

__all__ = ["BuildEvent", "BuildReport", "build_bundle"]


def build_bundle(
    source: str | Path,
    out: Path,
    options: BuildOptions,
    *,
    on_event: Callable[[BuildEvent], None] = lambda event: None,
) -> BuildReport:
    """Build, or bring up to date, the bundle in `out`.

    Raises:
        CheckpointError, BuildError, BundleError: each before anything of an existing bundle is replaced.
    """
    started = perf_counter()
    check_options(options)
    check_ours(out)
    checkpoint = open_checkpoint(source, variant=options.variant)
    adapter = find_adapter(checkpoint)
    plan = adapter.plan(checkpoint, options)
    quantization = prepare(options, checkpoint, plan)
    if options.builds_engines:
        library_version(options.backend)  # a missing library is said before the export, not after it
        targets = options.targets or default_targets(options.backend, options.precision)
        for precision in (options.precision, *(stage.precision for stage in plan.stages.values())):
            check_targets(options.backend, targets, precision)
    check_writable(out)
    with locked(out):
        builder = _Builder(checkpoint, adapter, plan, options, out, on_event, quantization)
        try:
            manifest = builder.build()
        except OSError as e:
            raise unwritten(e, out) from e
        report = BuildReport(
            bundle=out,
            manifest=manifest,
            events=tuple(builder.events),
            seconds=perf_counter() - started,
            dropped=previous_build.dropped(builder.old, manifest),
        )
        noop.remember(builder.journal, checkpoint.path, options, report)
    return report


class _Builder:
    """One build: owns the journal and the list of events."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter,
        plan: ModelPlan,
        options: BuildOptions,
        out: Path,
        on_event: Callable[[BuildEvent], None],
        quantization: Quantization | None = None,
    ) -> None:
        self.checkpoint, self.adapter, self.plan = checkpoint, adapter, plan
        self.options, self.out = options, out
        self.events: list[BuildEvent] = []
        self._on_event = on_event
        self._quantization = quantization
        self.journal = Journal(out)
        self.old = previous_build.existing(out)
        self.targets = options.targets or default_targets(options.backend, options.precision)

    def build(self) -> Manifest:
        """All stages, then the small files, then the manifest in one move, then the sweep of what is left over."""
        keys = {name: self._inputs(name, stage) for name, stage in self.plan.stages.items()}
        done = {name: self.journal.finished(name, digest(inputs)) for name, inputs in keys.items()}
        missing = [name for name, artifact in done.items() if artifact is None]
        if missing:
            check_weights(
                self.checkpoint,
                self.adapter,
                self.plan,
                self.options,
                self.out,
                missing,
                lambda what, doing: self._report(what, "working", doing),
            )
        artifacts = {name: self._artifact(name, stage) for name, stage in self.plan.stages.items()}
        engines: dict[str, Artifact] = {}
        if self.options.builds_engines:
            engines = {name: self._engine(name, artifact) for name, artifact in artifacts.items()}
        self._check_unchanged(keys)
        self.journal.hashes.save()
        manifest = self._manifest(artifacts, engines)
        if self.old is None or digest(manifest) != digest(previous_build.unsealed(self.old)):
            save_manifest(manifest, self.out)
        manifest = load_manifest(self.out)
        previous_build.sweep(self.out, manifest)
        return manifest

    def _check_unchanged(self, keys: dict[str, dict[str, Any]]) -> None:
        """Stages of two versions of a checkpoint would each be correct and together draw noise."""
        for name, stage in self.plan.stages.items():
            if digest(self._inputs(name, stage)) != digest(keys[name]):
                raise BuildError(
                    f"{self.checkpoint.path}: {' and '.join(stage.components)} changed while it was being built",
                    hint="build again once the checkpoint is complete; finished stages are reused",
                )

    def _reused(self, stage: str, artifact: Artifact | None) -> Artifact | None:
        if artifact is not None:
            self._report(
                stage, "reused", "nothing changed", size_bytes=sum(f.size_bytes for f in artifact.files)
            )
        return artifact

    def _artifact(self, name: str, stage: StagePlan) -> Artifact:
        """The stage's ONNX graph, reused or newly exported."""
        inputs = self._inputs(name, stage)
        key = digest(inputs)
        finished = self._reused(name, self.journal.finished(name, key))
        if finished is not None:
            return finished
        why, estimate = self.journal.why(name, inputs), export_bytes(self.checkpoint, self.plan, name)
        self._report(name, "building", why)
        started = perf_counter()
        with PeakMemory() as memory:
            module = self.adapter.load(self.checkpoint, self.plan, name, self.options)
            quantization = self._quantization if name == DENOISER else None
            precision = stage.precision if quantization is None else self.options.precision
            plan = None if quantization is None else quantization.plan(module)
            path = self.out / "onnx" / f"{name}-{precision.value}-{key[:8]}.onnx"
            files = to_onnx(module, path, quantize=plan, opset=self.options.opset)
        record = None
        if quantization is not None and plan is not None:
            record = write_record(path, plan, module.spec, quantization.ranges_sha256)
        weight_map = path.with_name(path.name + WEIGHTS)
        write_json(weight_map, to_json(files.weight_map))
        refs = [file_ref(path, self.out) for path in files.paths]
        artifact = Artifact(
            spec=module.spec,
            precision=precision,
            backend=GRAPH_BACKEND,
            file=refs[0],
            data=tuple(refs[1:]),
            weights=file_ref(weight_map, self.out),
            key=key,
            recipe=None if quantization is None else quantization.recipe.name,
            quantization=None if record is None else file_ref(record, self.out),
        )
        self._finish(
            name,
            inputs,
            artifact,
            self._extras(name, module),
            why=why,
            seconds=perf_counter() - started,
            peak_memory_bytes=memory.peak_bytes,
            estimated_memory_bytes=estimate,
        )
        return artifact

    def _engine(self, name: str, graph: Artifact) -> Artifact:
        """The engine of a finished graph, for all targets."""
        options, stage, record = self.options, f"{name} engine", f"engine-{name}"
        profiles = orientation_profiles(graph.spec, self.plan.defaults, options.backend)
        library = library_version(options.backend)
        gpu = find_gpu() if row_of(options.backend).built_on_gpu else None
        inputs = {
            "graph": graph.key,
            "backend": options.backend.value,
            "targets": list(self.targets),
            "profiles": to_json(profiles),
            "library_version": library,
            "gpu": to_json(gpu),
            "linear_attention": options.linear_attention,
            "weight_streaming": options.weight_streaming,
        }
        key = digest(inputs)
        finished = self._reused(stage, self.journal.finished(record, key))
        if finished is not None:
            return finished
        why, onnx = self.journal.why(record, inputs), self.out / graph.file.path
        gc.collect()  # exported modules hold cycles, and with them their weights
        for component in self.plan.stages[name].components:
            drop_pages(self.checkpoint.component(component).files)
        estimate = estimates.resident_bytes() + estimate_memory_bytes(onnx)
        self._report(stage, "building", why)
        report = build_engine(
            onnx,
            self.out / "engines" / f"{name}-{graph.precision.value}-{key[:8]}.{options.backend.value}",
            spec=graph.spec,
            backend=options.backend,
            targets=self.targets,
            profiles=profiles,
            timing_cache=self.journal.folder / "timing.cache",
            tf32=graph.precision is Precision.TF32,
            linear_attention=options.linear_attention,
            weight_streaming=options.weight_streaming,
            progress=lambda phase, step, steps: self._report(stage, "working", f"{phase} {step}/{steps}"),
        )
        artifact = Artifact(
            spec=graph.spec,
            precision=graph.precision,
            backend=options.backend,
            targets=self.targets,
            file=file_ref(report.file, self.out),
            weights=graph.weights,
            key=key,
            recipe=graph.recipe,
            quantization=graph.quantization,
            library=library,
            gpu=gpu.name if gpu else None,
        )
        self._finish(
            record,
            inputs,
            artifact,
            {},
            stage=stage,
            why=why,
            seconds=report.seconds,
            peak_memory_bytes=report.peak_memory_bytes,
            estimated_memory_bytes=estimate,
        )
        return artifact

    def _finish(
        self,
        record: str,
        inputs: dict[str, Any],
        artifact: Artifact,
        extra: dict[str, Any],
        *,
        why: str,
        stage: str | None = None,
        **measured: Any,
    ) -> None:
        """Write the journal, and only then say that the stage is done."""
        self.journal.write(record, inputs, {"artifact": to_json(artifact), **measured, **extra})
        size = sum(ref.size_bytes for ref in artifact.files)
        self._report(stage or record, "built", why, size_bytes=size, **measured)

    def _inputs(self, name: str, stage: StagePlan) -> dict[str, Any]:
        """Everything that the artifact depends on, by the words that the user reads when it changes."""
        components = [self.checkpoint.component(component) for component in stage.components]
        return {
            "stage": name,
            "weights": {c.name: self.journal.hashes.of_all(c.files) for c in components},
            "config": {c.name: c.config for c in components},
            "facts": dict(stage.facts),
            "shapes": to_json(stage.spec),
            "precision": stage.precision.value,
            "backend": GRAPH_BACKEND.value,
            "opset": self.options.opset,
            "quantization": self._quantization.facts() if self._quantization and name == DENOISER else None,
            "export_source": source_hash(),
            "tool_versions": tool_versions(),
        }

    def _extras(self, name: str, module: StageModule) -> dict[str, Any]:
        if name == VAE_ENCODER:
            return {"latent_rgb": fit_latent_rgb(module.module, self.plan.latents).tolist()}
        return {}

    def _manifest(self, artifacts: dict[str, Artifact], engines: dict[str, Artifact]) -> Manifest:
        records = {name: self._record(name, artifact) for name, artifact in artifacts.items()}
        latents = self.plan.latents
        rgb = records.get(VAE_ENCODER, {}).get("latent_rgb")
        if rgb:
            latents = LatentSpec(
                latents.channels, latents.scale_factor, latents.patch_size, tuple(tuple(row) for row in rgb)
            )
        table = coefficient_table(self.plan.scheduler, self.plan.defaults.num_inference_steps)
        tokenizers = [write_tokenizer(self.checkpoint.tokenizers, spec, self.out) for spec in self.plan.text]
        all_artifacts = {
            name: self._artifacts(name, artifact, engines.get(name)) for name, artifact in artifacts.items()
        }
        return Manifest(
            schema_version=SCHEMA_VERSION,
            family=self.plan.family,
            checkpoint=self.checkpoint.path.name,
            stages={
                name: Stage(artifacts=kept, golden=self._golden(name, artifacts[name], kept))
                for name, kept in all_artifacts.items()
            },
            text=tuple(
                replace(spec, tokenizer=ref.path)
                for spec, ref in zip(self.plan.text, tokenizers, strict=True)
            ),
            scheduler=self.plan.scheduler,
            latents=latents,
            defaults=self.plan.defaults,
            golden_table=GoldenTable(
                num_inference_steps=self.plan.defaults.num_inference_steps,
                timesteps=tuple(table.timesteps.astype(np.float64).tolist()),
                coefficients=tuple(tuple(row) for row in table.coefficients.astype(np.float64).tolist()),
            ),
            files=tuple(tokenizers),
            tools=tool_versions(),
        )

    def _golden(self, name: str, artifact: Artifact, kept: tuple[Artifact, ...]) -> FileRef:
        """The self-test's inputs and fp32 outputs, for all precisions of the stage.

        Its name follows from what they have in common and from their 16-bit precisions, whichever was built last.
        """
        precisions = sorted({a.precision.value for a in kept if a.precision in SIXTEEN_BITS})
        inputs = {"of": previous_build.but_for_precision(self._record(name, artifact)), "losses": precisions}
        record, key = f"golden-{name}", digest(inputs)
        known = self.journal.record(record, key)
        ref = from_json(FileRef, known["file"]) if known else None
        if ref is not None and self.journal.intact(ref):
            return ref
        self._report(name, "working", "golden inputs and outputs")
        exact = replace(self.options, precision=Precision.FP32, recipe=None, ranges=None, base_precision=None)
        plan = self.adapter.plan(self.checkpoint, exact)
        reference = self.adapter.load(self.checkpoint, plan, name, exact)
        deployed = None
        if artifact.precision in SIXTEEN_BITS:
            deployed = self.adapter.load(self.checkpoint, self.plan, name, self.options)
        recorded = previous_build.losses_of(self.old, name, self.out)
        path = write_golden(
            reference,
            self.out / "golden" / f"{name}-{key[:8]}.safetensors",
            deployed=deployed,
            losses={p: recorded[p] for p in precisions if p in recorded},
        )
        ref = file_ref(path, self.out)
        self.journal.write(record, inputs, {"file": to_json(ref)})
        return ref

    def _record(self, name: str, artifact: Artifact) -> dict[str, Any]:
        record = self.journal.record(name, artifact.key)
        if record is None:
            raise BuildError(f"{name}: the build journal vanished while building", hint="build again")
        return record

    def _artifacts(self, name: str, graph: Artifact, engine: Artifact | None) -> tuple[Artifact, ...]:
        new = (graph,) if engine is None else (graph, engine)
        stay = previous_build.artifacts_that_stay(
            self.old, self.checkpoint.path.name, name, new, self.journal
        )
        return previous_build.in_order((*new, *stay))

    def _report(self, stage: str, status: Status, why: str, **measured: Any) -> None:
        event = BuildEvent(stage=stage, status=status, why=why, **measured)
        if status in ("reused", "built"):
            self.events.append(event)
        self._on_event(event)
