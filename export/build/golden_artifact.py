"""One stage's golden file in a bundle. It serves all precisions of the stage, and is reused if nothing changed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ditc.export.build import previous_build
from ditc.export.build.build_key import digest
from ditc.export.build.context import BuildContext
from ditc.export.build.golden import write_golden
from ditc.export.build.layout import golden_path
from ditc.export.build.records import GoldenInputs, GoldenRecord, StageRecord
from ditc.export.checkpoint.release_memory import release_memory
from ditc.runtime.bundle.integrity import file_ref
from ditc.runtime.bundle.manifest import Artifact, FileRef
from ditc.runtime.spec import SIXTEEN_BITS, Precision


def golden_artifact(build: BuildContext, graph: StageRecord, kept: tuple[Artifact, ...]) -> FileRef:
    """The file with the self-test's inputs and fp32 outputs of a stage.

    Its name is derived from the inputs that all precisions of the stage share and from the stage's 16-bit precisions,
    so it does not depend on which precision was built last.

    Args:
        graph: the record of the stage's graph.
        kept: all artifacts of the stage.
    """
    name = graph.inputs.stage
    precisions = sorted({a.precision.value for a in kept if a.precision in SIXTEEN_BITS})
    inputs = GoldenInputs(of=previous_build.without_precision(graph.inputs), losses=tuple(precisions))
    known = build.journal.record_of(GoldenRecord, inputs)
    if known is not None and build.journal.intact(known.file):
        return known.file
    build.events.working(name, "computing golden inputs and outputs")
    load, checkpoint = build.adapter.load, build.checkpoint
    exact = replace(build.options, precision=Precision.FP32, recipes=(), ranges=(), base_precision=None)
    reference = partial(load, checkpoint, build.adapter.plan(checkpoint, exact), name, exact)
    deployed = None
    if graph.artifact.precision in SIXTEEN_BITS:
        deployed = partial(load, checkpoint, build.plan, name, build.options)
    recorded = previous_build.losses_of(build.old, name, build.journal)
    path = golden_path(build.out, name, digest(inputs))
    build.journal.will_write(path)
    write_golden(
        reference,
        path,
        deployed=deployed,
        losses={p: recorded[p] for p in precisions if p in recorded},
    )
    release_memory(build.files_of(name))
    ref = file_ref(path, build.out)
    build.journal.write(GoldenRecord(inputs=inputs, file=ref))
    return ref
