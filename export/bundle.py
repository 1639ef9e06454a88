"""Checkpoint to bundle: every stage content-addressed, finished ones reused, the manifest switched last.

bundle/.build/KEY.json    journal: one finished artifact and what it was made from; a killed build resumes here
bundle/.build/lock        held while building; the operating system frees it when the owner dies
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import filelock
import numpy as np

from ditc.export.adapters import find_adapter
from ditc.export.checkpoint import Checkpoint, open_checkpoint
from ditc.export.engine import build_engine, library_version
from ditc.export.engines.profiles import orientation_profiles
from ditc.export.engines.targets import check_targets, default_targets
from ditc.export.keys import FileHashes, digest, explain, source_hash, tool_versions
from ditc.export.latent_rgb import fit_latent_rgb
from ditc.export.onnx import to_onnx
from ditc.export.quant.apply import Quantization, prepare
from ditc.export.stages import Adapter, BuildOptions, ModelPlan, StageModule, StagePlan
from ditc.export.tokenizer import tokenizer_json
from ditc.runtime.errors import BuildError, BundleError, UsageError
from ditc.runtime.integrity import file_ref
from ditc.runtime.jsondata import Mismatch, from_json, to_json
from ditc.runtime.manifest import (
    MANIFEST,
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
from ditc.runtime.schedulers import coefficient_table
from ditc.runtime.spec import DENOISER, VAE_ENCODER, Backend, Precision

log = logging.getLogger(__name__)

Status = Literal["reused", "building", "built"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildEvent:
    """What happened to one stage, for progress and for the summary."""

    stage: str
    status: Status
    why: str
    seconds: float = 0.0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """The finished bundle and what each stage cost."""

    bundle: Path
    manifest: Manifest
    events: tuple[BuildEvent, ...]
    seconds: float


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
    _check_options(options)
    _check_ours(out)
    checkpoint = open_checkpoint(source)
    adapter = find_adapter(checkpoint)
    plan = adapter.plan(checkpoint, options)
    quantization = prepare(options, checkpoint, plan)
    if options.backend is not Backend.ONNXRUNTIME:
        library_version(options.backend)  # a missing library is said before the export, not after it
        for stage in plan.stages.values():
            check_targets(
                options.backend, options.targets or default_targets(options.backend), stage.precision
            )
        check_targets(options.backend, options.targets or default_targets(options.backend), options.precision)
    _check_writable(out)
    with _locked(out):
        builder = _Builder(checkpoint, adapter, plan, options, out, on_event, quantization)
        manifest = builder.build()
    return BuildReport(
        bundle=out, manifest=manifest, events=tuple(builder.events), seconds=perf_counter() - started
    )


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
        self.checkpoint, self.adapter, self.plan, self.options, self.out = (
            checkpoint,
            adapter,
            plan,
            options,
            out,
        )
        self.events: list[BuildEvent] = []
        self._on_event = on_event
        self._quantization = quantization
        self._journal = out / ".build"
        self._hashes = FileHashes(self._journal / "inputs.json")
        self._old = _existing(out)
        self.targets = options.targets or default_targets(options.backend)

    def build(self) -> Manifest:
        """All stages, then the small files, then the manifest in one move, then the sweep of what is left over."""
        artifacts = {name: self._artifact(name, stage) for name, stage in self.plan.stages.items()}
        engines: dict[str, Artifact] = {}
        if self.options.backend is not Backend.ONNXRUNTIME:
            engines = {name: self._engine(name, artifact) for name, artifact in artifacts.items()}
        self._hashes.save()
        manifest = self._manifest(artifacts, engines)
        if self._old is None or digest(manifest) != digest(_unsealed(self._old)):
            save_manifest(manifest, self.out)
        manifest = load_manifest(self.out)
        self._sweep(manifest)
        return manifest

    def _artifact(self, name: str, stage: StagePlan) -> Artifact:
        inputs = self._inputs(name, stage)
        key = digest(inputs)
        journal = self._journal / f"{name}-{key[:16]}.json"
        finished = self._finished(journal)
        if finished is not None:
            self._report(name, "reused", "nothing changed", size=sum(f.size_bytes for f in finished.files))
            return finished
        why = self._why(name, inputs)
        self._report(name, "building", why)
        started = perf_counter()
        module = self.adapter.load(self.checkpoint, self.plan, name, self.options)
        quantization = self._quantization if name == DENOISER else None
        precision = stage.precision if quantization is None else self.options.precision
        plan = None if quantization is None else quantization.plan(module)
        path = self.out / "onnx" / f"{name}-{precision.value}-{key[:8]}.onnx"
        files = to_onnx(module, path, quantize=plan)
        refs = [file_ref(path, self.out) for path in files.paths]
        artifact = Artifact(
            spec=module.spec,
            precision=precision,
            backend=Backend.ONNXRUNTIME,
            file=refs[0],
            data=tuple(refs[1:]),
            key=key,
            recipe=None if quantization is None else quantization.recipe.name,
        )
        extra = {"weights": [to_json(weight) for weight in files.weight_map], **self._extras(name, module)}
        _write_json(journal, {"inputs": inputs, "artifact": to_json(artifact), **extra})
        seconds = perf_counter() - started
        self._report(name, "built", why, seconds, sum(ref.size_bytes for ref in refs))
        return artifact

    def _engine(self, name: str, graph: Artifact) -> Artifact:
        """The engine of a finished graph, for all targets."""
        options, stage = self.options, f"{name} engine"
        profiles = orientation_profiles(graph.spec, self.plan.defaults)
        inputs = {
            "graph": graph.key,
            "backend": options.backend.value,
            "targets": list(self.targets),
            "profiles": to_json(profiles),
            "library_version": library_version(options.backend),
        }
        key = digest(inputs)
        journal = self._journal / f"engine-{name}-{key[:16]}.json"
        finished = self._finished(journal)
        if finished is not None:
            self._report(stage, "reused", "nothing changed", size=finished.file.size_bytes)
            return finished
        why = self._why(f"engine-{name}", inputs)
        self._report(stage, "building", why)
        report = build_engine(
            self.out / graph.file.path,
            self.out / "engines" / f"{name}-{graph.precision.value}-{key[:8]}.{options.backend.value}",
            spec=graph.spec,
            backend=options.backend,
            targets=self.targets,
            profiles=profiles,
            timing_cache=self._journal / "timing.cache",
            tf32=graph.precision is Precision.TF32,
            progress=lambda phase, step, steps: self._report(stage, "building", f"{phase} {step}/{steps}"),
        )
        artifact = Artifact(
            spec=graph.spec,
            precision=graph.precision,
            backend=options.backend,
            targets=self.targets,
            file=file_ref(report.file, self.out),
            key=key,
            recipe=graph.recipe,
        )
        measured = {"seconds": report.seconds, "peak_memory_bytes": report.peak_memory_bytes}
        _write_json(journal, {"inputs": inputs, "artifact": to_json(artifact), **measured})
        peak = f"{why}; peak memory {report.peak_memory_bytes / 1e9:.1f} GB"
        self._report(stage, "built", peak, report.seconds, report.size_bytes)
        return artifact

    def _inputs(self, name: str, stage: StagePlan) -> dict[str, Any]:
        """Everything that the artifact depends on, by the words that the user reads when it changes."""
        components = [self.checkpoint.component(component) for component in stage.components]
        return {
            "stage": name,
            "weights": {c.name: self._hashes.of_all(c.files) for c in components},
            "config": {c.name: c.config for c in components},
            "shapes": to_json(stage.spec),
            "precision": stage.precision.value,
            "backend": Backend.ONNXRUNTIME.value,
            "quantization": self._quantization.facts() if self._quantization and name == DENOISER else None,
            "export_source": source_hash(),
            "tool_versions": tool_versions(),
        }

    def _finished(self, journal: Path) -> Artifact | None:
        """The artifact that the journal speaks of, if all of its files are there in the recorded size and time."""
        record = _read_json(journal)
        try:
            artifact = from_json(Artifact, record["artifact"]) if record else None
        except (Mismatch, KeyError):
            return None
        if artifact is None or not all(self._intact(ref) for ref in artifact.files):
            return None
        return artifact

    def _intact(self, ref: FileRef) -> bool:
        path = self.out / ref.path
        return (
            path.is_file() and path.stat().st_size == ref.size_bytes and self._hashes.of(path) == ref.sha256
        )

    def _why(self, name: str, inputs: dict[str, Any]) -> str:
        earlier = sorted(self._journal.glob(f"{name}-*.json"), key=lambda path: path.stat().st_mtime)
        record = _read_json(earlier[-1]) if earlier else None
        if record is None:
            return "not built yet"
        reason = explain(record.get("inputs", {}), inputs)
        return "its files are missing or damaged" if reason == "nothing changed" else reason

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
        weights = [weight for record in records.values() for weight in record["weights"]]
        _write_json(self.out / "weights.json", weights)
        table = coefficient_table(self.plan.scheduler, self.plan.defaults.num_inference_steps)
        return Manifest(
            schema_version=SCHEMA_VERSION,
            family=self.plan.family,
            checkpoint=self.checkpoint.path.name,
            stages={
                name: Stage(artifacts=self._merged(name, artifact, engines.get(name)))
                for name, artifact in artifacts.items()
            },
            text=self.plan.text,
            scheduler=self.plan.scheduler,
            latents=latents,
            defaults=self.plan.defaults,
            golden_table=GoldenTable(
                num_inference_steps=self.plan.defaults.num_inference_steps,
                timesteps=tuple(table.timesteps.astype(np.float64).tolist()),
                coefficients=tuple(tuple(row) for row in table.coefficients.astype(np.float64).tolist()),
            ),
            files=(file_ref(self.out / "weights.json", self.out), *self._tokenizers()),
            tools=tool_versions(),
        )

    def _record(self, name: str, artifact: Artifact) -> dict[str, Any]:
        record = _read_json(self._journal / f"{name}-{artifact.key[:16]}.json")
        if record is None:
            raise BuildError(f"{name}: the build journal vanished while building", hint="build again")
        return record

    def _merged(self, name: str, artifact: Artifact, engine: Artifact | None) -> tuple[Artifact, ...]:
        """The new artifacts beside those of other precisions and backends that an earlier build left intact."""
        new = (artifact,) if engine is None else (artifact, engine)
        if (
            self._old is None
            or self._old.checkpoint != self.checkpoint.path.name
            or name not in self._old.stages
        ):
            return new
        slots = {(a.precision, a.backend) for a in new}
        others = [
            a
            for a in self._old.stages[name].artifacts
            if (a.precision, a.backend) not in slots and all(self._intact(ref) for ref in a.files)
        ]
        graphs = [
            a for a in others if a.backend is Backend.ONNXRUNTIME and self._same_source(name, a, artifact)
        ]
        current = {(graph.precision, graph.key) for graph in (artifact, *graphs)}
        earlier = {
            a.precision: a.key for a in self._old.stages[name].artifacts if a.backend is Backend.ONNXRUNTIME
        }
        engines = [
            a
            for a in others
            # An engine was made from the graph of its precision, and goes when that graph goes.
            if a.backend is not Backend.ONNXRUNTIME and (a.precision, earlier.get(a.precision)) in current
        ]
        return (*new, *graphs, *engines)

    def _same_source(self, name: str, other: Artifact, artifact: Artifact) -> bool:
        """Whether two artifacts of a stage differ in precision only: same weights, same config, same exporter."""
        old, new = (_read_json(self._journal / f"{name}-{a.key[:16]}.json") for a in (other, artifact))
        if old is None or new is None:
            return False
        return _but_for_precision(old) == _but_for_precision(new)

    def _tokenizers(self) -> Iterator[FileRef]:
        for spec in self.plan.text:
            target = self.out / spec.tokenizer
            _write(target, tokenizer_json(self.checkpoint.tokenizers[target.parent.name]))
            yield file_ref(target, self.out)

    def _sweep(self, manifest: Manifest) -> None:
        """Remove graphs that no manifest names any more; the journal of what is kept stays."""
        kept = {ref.path for ref in manifest.all_files()}
        for path in (*(self.out / "onnx").glob("*"), *(self.out / "engines").glob("*")):
            if path.relative_to(self.out).as_posix() not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _report(self, stage: str, status: Status, why: str, seconds: float = 0.0, size: int = 0) -> None:
        event = BuildEvent(stage=stage, status=status, why=why, seconds=seconds, size_bytes=size)
        if status != "building":
            self.events.append(event)
        self._on_event(event)


def _but_for_precision(record: dict[str, Any]) -> dict[str, Any]:
    """What an artifact was made from, without what differs between precisions of one graph."""
    return {**record["inputs"], "precision": "", "quantization": None, "shapes": _shapes(record)}


def _shapes(record: dict[str, Any]) -> Any:
    """A stage's shapes and profile without element types, which follow the precision."""
    spec = record["inputs"]["shapes"]
    named = {kind: [(t["name"], t["shape"]) for t in spec[kind]] for kind in ("inputs", "outputs")}
    return {**named, "profile": spec["profile"]}


def _check_options(options: BuildOptions) -> None:
    if options.max_batch < 1:
        raise UsageError(f"max_batch is {options.max_batch}", hint="take at least 1")
    if options.resolution is not None and options.resolution < 1:
        raise UsageError(
            f"resolution is {options.resolution} pixels", hint="leave it out for the checkpoint's own"
        )


def _check_ours(out: Path) -> None:
    """Refuse to build among someone's files: the build removes what its manifest does not name."""
    if (
        out.is_dir()
        and not (out / MANIFEST).exists()
        and not (out / ".build").exists()
        and any(out.iterdir())
    ):
        raise BuildError(f"{out} is not empty and not a bundle", hint="choose a new directory for -o")
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out} is a file", hint="choose a directory for -o")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = filelock.FileLock(out / ".build" / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as e:
        raise BuildError(
            f"another build is working in {out}", hint="wait for it; a killed build frees its lock by itself"
        ) from e
    try:
        yield
    finally:
        lock.release()


def _check_writable(out: Path) -> None:
    try:
        (out / ".build").mkdir(parents=True, exist_ok=True)
        probe = out / ".build" / f"probe.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise BuildError(f"cannot write into {out}: {e.strerror}", hint="choose another -o directory") from e


def _existing(out: Path) -> Manifest | None:
    try:
        return load_manifest(out)
    except BundleError:
        return None


def _unsealed(manifest: Manifest) -> dict[str, Any]:
    return {**to_json(manifest), "digest": ""}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, data: Any) -> None:
    _write(path, json.dumps(data, indent=1, ensure_ascii=False))


def _write(path: Path, text: str) -> None:
    if path.is_file() and path.read_bytes() == text.encode():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
