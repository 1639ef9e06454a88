"""Recognise a build that has nothing to do, from file hashes alone and before torch is imported.

A build depends on the bytes of the checkpoint's files, the options, the source of ditc and the versions of its tools.
If all of these are as they were for a finished build, and the bundle still holds that build's manifest and files,
building again would change nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from time import perf_counter
from typing import Any

from ditc.export.build.build_key import tool_versions
from ditc.export.build.events import BuildEvent, BuildReport
from ditc.export.build.journal import Journal
from ditc.export.build.records import RequestInputs, RequestRecord
from ditc.export.build.source_hash import bundle_source
from ditc.export.options import BuildOptions
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import BundleError
from ditc.runtime.gpu import find_gpu
from ditc.runtime.lora.lora_file import files_of
from ditc.runtime.sessions.registry import library_version, row_of

# The files of a checkpoint that a build may read: weights, configs, and tokenizers (SentencePiece models,
# vocabularies, templates).
SUFFIXES = frozenset({".safetensors", ".json", ".model", ".txt", ".jinja"})


def up_to_date(
    source: str | Path, out: Path, options: BuildOptions, *, key: Any = None
) -> BuildReport | None:
    """The report of a build that changes nothing; None if there may be something to do.

    Args:
        key: the private key of a build that signs, for which every file is hashed.
    """
    started = perf_counter()
    checkpoint = Path(source)
    journal = Journal(out, key)
    if not checkpoint.is_dir() or not journal.folder.is_dir():
        return None
    record = journal.record_of(RequestRecord, request(checkpoint, options, journal))
    if record is None:
        return None
    try:
        manifest = load_manifest(out)
    except BundleError:
        return None
    if manifest.digest != record.manifest or not all(map(journal.intact, manifest.all_files())):
        return None
    events = tuple(
        BuildEvent(stage=name, status="reused", why="nothing changed", size_bytes=size)
        for name, size in record.stages.items()
    )
    return BuildReport(bundle=out, manifest=manifest, events=events, seconds=perf_counter() - started)


def remember(journal: Journal, checkpoint: Path, options: BuildOptions, report: BuildReport) -> None:
    """Record a finished build, so that the next call of `up_to_date` recognises it."""
    for ref in report.manifest.all_files():
        journal.hashes.of(report.bundle / ref.path)
    inputs = request(checkpoint, options, journal)
    journal.hashes.save()
    stages = {event.stage: event.size_bytes for event in report.events}
    journal.write(RequestRecord(inputs=inputs, manifest=report.manifest.digest, stages=stages))


def request(checkpoint: Path, options: BuildOptions, journal: Journal) -> RequestInputs:
    """Collect everything that a build depends on."""
    files = sorted(path for path in checkpoint.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    loras = [path for choice in options.loras for path in files_of(choice.file)]
    named = [*options.ranges, *map(Path, options.recipes), *loras]
    if options.controlnet is not None:
        named += sorted(path for path in options.controlnet.rglob("*") if path.suffix in SUFFIXES)
    options_files = [path for path in named if path.is_file()]
    return RequestInputs(
        checkpoint=checkpoint.resolve().name,
        files={path.relative_to(checkpoint).as_posix(): journal.hashes.of(path) for path in files},
        options={field.name: str(getattr(options, field.name)) for field in dataclasses.fields(options)},
        option_files={str(path): journal.hashes.of(path) for path in options_files},
        ditc_source=bundle_source(),
        tool_versions={**tool_versions(), options.backend: library_version(options.backend) or ""},
        gpu=find_gpu() if row_of(options.backend).built_on_gpu else None,
    )
