"""The journal's records are typed and read strictly. If one cannot be read, its artifact is made again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditc.export.build.build_key import digest, explain
from ditc.export.build.builder import build_bundle
from ditc.export.build.journal import Journal
from ditc.export.build.noop import up_to_date
from ditc.export.build.records import EngineInputs, EngineRecord, GoldenRecord, RequestRecord, StageRecord
from ditc.export.contract import BuildOptions
from ditc.runtime.bundle.build_cost import BuildCost, artifact_record, read_cost, record_path
from ditc.runtime.bundle.manifest import Manifest, load_manifest
from ditc.runtime.spec import Backend, Precision, Range

ENGINE = EngineInputs(
    stage="denoiser",
    graph="0" * 64,
    backend=Backend.TENSORRT_RTX,
    targets=("sm89",),
    profiles=({"batch": Range(1, 2, 4)}, {}),
    library_version="1.7.1",
    gpu=None,
    linear_attention="decomposed",
    weight_streaming=False,
    refit=False,
    engine_source="e",
)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return load_manifest(bundle)


def stage_record(bundle: Path, manifest: Manifest, stage: str) -> StageRecord:
    record = Journal(bundle).record(StageRecord, stage, manifest.stages[stage].artifacts[0].key)
    assert record is not None
    return record


def test_every_record_of_a_build_is_read_and_is_under_the_key_of_its_inputs(
    bundle: Path, manifest: Manifest
) -> None:
    journal, kinds = Journal(bundle), (StageRecord, GoldenRecord, RequestRecord)
    names = {*manifest.stages, *(f"golden-{stage}" for stage in manifest.stages), "request"}
    assert {path.stem.rpartition("-")[0] for path in journal.records()} == names
    for path in journal.records():
        name, _, key = path.stem.rpartition("-")
        (record,) = [found for kind in kinds if (found := journal.record(kind, name, key)) is not None]
        assert record.inputs.record_name == name and digest(record.inputs).startswith(key)
    for stage in manifest.stages:
        record = stage_record(bundle, manifest, stage)
        assert record.artifact == manifest.stages[stage].artifacts[0]
        assert (record.latent_rgb is not None) == (stage == "vae_encoder")


def test_a_record_of_an_engine_is_the_same_after_reading(bundle: Path, manifest: Manifest) -> None:
    artifact = replace(
        manifest.stages["denoiser"].artifacts[0], backend=Backend.TENSORRT_RTX, key=digest(ENGINE)
    )
    cost = BuildCost(seconds=1.5, peak_memory_bytes=2, estimated_memory_bytes=3)
    journal = Journal(bundle)
    journal.write(EngineRecord(inputs=ENGINE, artifact=artifact, cost=cost))
    record = journal.record_of(EngineRecord, ENGINE)
    assert record == EngineRecord(inputs=ENGINE, artifact=artifact, cost=cost)
    assert read_cost(bundle, "denoiser", artifact) == cost
    assert artifact_record("denoiser", Backend.TENSORRT_RTX) == ENGINE.record_name != "denoiser"


def test_changed_inputs_are_named_in_words(bundle: Path, manifest: Manifest) -> None:
    inputs = stage_record(bundle, manifest, "denoiser").inputs
    assert explain(inputs, inputs) == "nothing changed"
    other = replace(inputs, weights={}, tool_versions={}, precision=Precision.FP16)
    assert explain(inputs, other) == "precision, tool versions, weights changed"
    assert explain(ENGINE, replace(ENGINE, targets=("sm86",))) == "targets changed"
    assert Journal(bundle).why(StageRecord, other) == "precision, tool versions, weights changed"
    assert Journal(bundle).why(EngineRecord, ENGINE) == "not built yet"


def damaged(record: dict[str, Any]) -> list[object]:
    """Damaged records: truncated, with a wrong type, with one field too many or too few, or of an earlier version."""
    inputs = record["inputs"]
    return [
        "{",
        [],
        None,
        {**record, "inputs": {**inputs, "opset": "20"}},
        {**record, "inputs": {**inputs, "color": "red"}},
        {**record, "inputs": {name: value for name, value in inputs.items() if name != "opset"}},
        {**{k: v for k, v in record.items() if k != "cost"}, **record["cost"]},
    ]


@pytest.mark.parametrize("case", range(7))
def test_a_record_that_cannot_be_read_means_to_build_again(
    bundle: Path, manifest: Manifest, case: int
) -> None:
    record = stage_record(bundle, manifest, "conditioner")
    path = record_path(bundle, "conditioner", digest(record.inputs))
    broken = damaged(json.loads(path.read_text()))[case]
    path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
    journal = Journal(bundle)
    assert journal.finished(StageRecord, record.inputs) is None
    assert journal.why(StageRecord, record.inputs) == "the record of its last build cannot be read"
    if case == 6:
        assert read_cost(bundle, "conditioner", record.artifact) is None


def test_a_bundle_without_readable_records_is_built_again_and_equal(
    tiny_checkpoint: Path, bundle: Path, manifest: Manifest
) -> None:
    """The bundle of an earlier version loads, but its build is not known to be finished, so it is built again."""
    for path in Journal(bundle).records():
        path.write_text(json.dumps({"inputs": {}, "artifact": {}}))
    assert load_manifest(bundle) == manifest
    assert up_to_date(tiny_checkpoint, bundle, BuildOptions()) is None
    report = build_bundle(tiny_checkpoint, bundle, BuildOptions())
    assert {event.why for event in report.events} == {"the record of its last build cannot be read"}
    assert report.manifest.stages == manifest.stages
