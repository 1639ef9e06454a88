"""Decide which artifacts of earlier builds stay in a bundle, and remove the files of those that do not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ditc.export.build.journal import Journal
from ditc.export.build.layout import is_build_folder
from ditc.export.build.records import StageInputs, StageRecord
from ditc.runtime.bundle.build_cost import artifact_record
from ditc.runtime.bundle.golden import read_golden
from ditc.runtime.bundle.manifest import Artifact, Manifest, load_manifest
from ditc.runtime.errors import BundleError
from ditc.runtime.sessions.registry import is_graph, rows
from ditc.runtime.spec import DType, Precision, TensorSpec


def existing(out: Path) -> Manifest | None:
    """The manifest of the bundle in `out`; None if there is none or it cannot be read."""
    try:
        return load_manifest(out)
    except BundleError:
        return None


def without_digest(manifest: Manifest) -> Manifest:
    """A manifest without its digest."""
    return replace(manifest, digest="")


def artifacts_that_stay(
    old: Manifest | None, checkpoint: str, name: str, new: tuple[Artifact, ...], journal: Journal
) -> list[Artifact]:
    """The stage's artifacts of other precisions and backends that stay from earlier builds.

    A graph stays if it was made from the same weights, config and exporter as the new one. An engine stays as long as
    the graph that it was built from is current.

    Args:
        checkpoint: the name of the checkpoint that is built now. Nothing stays from another checkpoint's bundle.
        new: the graph just built or reused, then its engine if there is one.
    """
    if old is None or old.checkpoint != checkpoint or name not in old.stages:
        return []
    artifact, before = new[0], old.stages[name].artifacts
    slots = {(a.precision, a.backend) for a in new}
    others = [
        a for a in before if (a.precision, a.backend) not in slots and all(map(journal.intact, a.files))
    ]
    graphs = [a for a in others if is_graph(a) and _same_source(journal, name, a, artifact)]
    current = {(graph.precision, graph.key) for graph in (artifact, *graphs)}
    earlier = {a.precision: a.key for a in before if is_graph(a)}
    engines = [
        a
        for a in others
        # An engine was built from the graph of its precision, and is removed together with it.
        if not is_graph(a) and (a.precision, earlier.get(a.precision)) in current
    ]
    return [*graphs, *engines]


def in_order(artifacts: Iterable[Artifact]) -> tuple[Artifact, ...]:
    """Sort artifacts by precision and backend, graphs before engines.

    Equal artifacts then give an equal manifest, whichever was built last, so that a signature and a certificate of
    the bundle stay valid.
    """
    places = {row.name: place for place, row in enumerate(reversed(rows()))}  # graphs first

    def place(artifact: Artifact) -> tuple[int, int, str]:
        return (
            list(Precision).index(artifact.precision),
            places.get(artifact.backend, len(places)),
            artifact.backend,
        )

    return tuple(sorted(artifacts, key=place))


def losses_of(old: Manifest | None, stage: str, journal: Journal) -> dict[str, float]:
    """The errors of 16-bit precisions that the earlier build's golden file records (GoldenInfo.losses)."""
    golden = old.stages[stage].golden if old is not None and stage in old.stages else None
    if golden is None or not journal.intact(golden):
        return {}
    try:
        return read_golden(journal.bundle / golden.path).info.losses
    except BundleError:
        return {}


def without_precision(inputs: StageInputs) -> StageInputs:
    """The inputs changed to those of an unquantized fp32 graph. They are then equal for all precisions of a graph."""
    spec = inputs.shapes
    shapes = replace(
        spec, inputs=tuple(map(_in_fp32, spec.inputs)), outputs=tuple(map(_in_fp32, spec.outputs))
    )
    return replace(inputs, precision=Precision.FP32, quantization=None, shapes=shapes)


def dropped(old: Manifest | None, new: Manifest) -> tuple[str, ...]:
    """The artifacts of the old manifest whose stage, precision and backend the new manifest lacks, in words."""
    if old is None:
        return ()
    kept = set(slots(new))
    return tuple(
        f"{stage} {precision} ({backend})"
        for stage, precision, backend in slots(old)
        if (stage, precision, backend) not in kept
    )


def sweep(bundle: Path, old: Manifest | None, manifest: Manifest, journal: Journal) -> None:
    """Remove files of earlier builds that the manifest does not name any more.

    A file of an earlier build is one that the journal or the old manifest names. No other file is removed.
    """
    kept = {ref.path for ref in manifest.all_files()}
    earlier = journal.written() | ({ref.path for ref in old.all_files()} if old is not None else set())
    for name in set(map(PurePosixPath, earlier)) - set(map(PurePosixPath, kept)):
        if _is_file_of_a_build(bundle, name):
            (bundle / name).unlink()
    journal.set_written(kept)


def _is_file_of_a_build(bundle: Path, name: PurePosixPath) -> bool:
    """Whether there is such a file where builds write. A journal that came from elsewhere may name any path."""
    if len(name.parts) != 2 or not is_build_folder(name.parts[0]) or "\\" in name.parts[1]:
        return False
    # Not the methods of Path, which raise for a name that no file can have.
    path = os.path.join(bundle, name)  # noqa: PTH118
    return not (bundle / name.parts[0]).is_symlink() and (os.path.isfile(path) or os.path.islink(path))  # noqa: PTH113, PTH114


def slots(manifest: Manifest) -> list[tuple[str, str, str]]:
    """Stage, precision and backend of every artifact."""
    return [
        (name, artifact.precision.value, artifact.backend.value)
        for name, stage in manifest.stages.items()
        for artifact in stage.artifacts
    ]


def _same_source(journal: Journal, name: str, other: Artifact, artifact: Artifact) -> bool:
    """Whether two artifacts of a stage differ in precision only: same weights, same config, same exporter."""
    old, new = (
        journal.record(StageRecord, artifact_record(name, a.backend), a.key) for a in (other, artifact)
    )
    if old is None or new is None:
        return False
    return without_precision(old.inputs) == without_precision(new.inputs)


def _in_fp32(tensor: TensorSpec) -> TensorSpec:
    return replace(tensor, dtype=DType.FLOAT32)
