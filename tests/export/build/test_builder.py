"""Building a bundle: what is reused, what a change rebuilds, what a broken or wrong build leaves behind."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pytest
from safetensors.numpy import save

from ditc.export.build import builder as bundle_module
from ditc.export.build import graph_artifact, noop
from ditc.export.build.build_key import digest
from ditc.export.build.builder import BuildEvent, BuildReport, build_bundle
from ditc.export.build.context import BuildContext
from ditc.export.build.graph_artifact import stage_inputs
from ditc.export.build.journal import Journal
from ditc.export.build.records import StageRecord
from ditc.export.contract import BuildOptions
from ditc.runtime.bundle.build_cost import FOLDER
from ditc.runtime.bundle.golden import METADATA, read_golden
from ditc.runtime.bundle.integrity import check_files, file_ref
from ditc.runtime.bundle.jsondata import to_json
from ditc.runtime.bundle.manifest import load_manifest, save_manifest
from ditc.runtime.bundle.safetensors import read_safetensors
from ditc.runtime.cli import USAGE, main
from ditc.runtime.errors import BuildError, CheckpointError, DitcError, OutputError, UsageError
from ditc.runtime.schedulers import SchedulerKind
from ditc.runtime.spec import Backend, Precision

TRANSFORMER = {"conditioner", "denoiser"}
VAE = {"vae_decoder", "vae_encoder"}
ALL = {"text_encoder"} | TRANSFORMER | VAE


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


class Stopped(Exception):
    """Raised in place of writing the manifest, as if the process had died there."""


def would_build(
    checkpoint: Path, bundle: Path, options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """The stages that a build would export, with its reasons, without exporting them."""
    reasons: dict[str, str] = {}

    def note(build: BuildContext, name: str) -> StageRecord | None:
        inputs = stage_inputs(build, name)
        finished = build.journal.finished(StageRecord, inputs)
        if finished is None:
            reasons[name] = build.journal.why(StageRecord, inputs)
        return finished

    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(bundle_module, "graph_artifact", note)
        patch.setattr(bundle_module, "assemble", stop)
        with pytest.raises(Stopped):
            build_bundle(checkpoint, bundle, options)
    return reasons


def contents(bundle: Path) -> dict[str, tuple[int, int]]:
    """Every file of the bundle except the journal, with its inode and the time of its last change."""
    return {
        path.relative_to(bundle).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in bundle.rglob("*")
        if path.is_file() and not path.is_relative_to(bundle / FOLDER)
    }


def test_a_second_build_does_nothing_and_says_why(tiny_checkpoint: Path, bundle: Path) -> None:
    before = contents(bundle)
    report = build_bundle(tiny_checkpoint, bundle, BuildOptions())
    assert {event.stage: (event.status, event.why) for event in report.events} == dict.fromkeys(
        ALL, ("reused", "nothing changed")
    )
    assert contents(bundle) == before


def test_artifacts_made_from_other_inputs_are_removed_and_named(tiny_checkpoint: Path, bundle: Path) -> None:
    manifest = load_manifest(bundle)
    stage = manifest.stages["conditioner"]
    foreign = replace(stage.artifacts[0], precision=Precision.FP16, key="0" * 64)
    stages = {**manifest.stages, "conditioner": replace(stage, artifacts=(*stage.artifacts, foreign))}
    save_manifest(replace(manifest, stages=stages), bundle)
    report = build_bundle(tiny_checkpoint, bundle, BuildOptions())
    assert report.dropped == ("conditioner fp16 (onnxruntime)",)
    assert load_manifest(bundle).stages == manifest.stages


def test_the_same_artifacts_are_the_same_manifest_whichever_was_built_last(
    tiny_checkpoint: Path, bundle: Path
) -> None:
    """Else a build with nothing to do would void the signature and certificate, and lose the recorded fp16 error."""
    manifest, journal = load_manifest(bundle), Journal(bundle)
    stage = manifest.stages["conditioner"]
    fp32 = stage.artifacts[0]
    record = journal.record(StageRecord, "conditioner", fp32.key)
    assert record is not None and stage.golden is not None
    inputs = replace(record.inputs, precision=Precision.FP16)
    fp16 = replace(fp32, precision=Precision.FP16, key=digest(inputs))
    journal.write(replace(record, inputs=inputs, artifact=fp16))
    golden = read_golden(bundle / stage.golden.path)
    info = replace(golden.info, losses={"fp16": 1e-3})
    tensors, _ = read_safetensors(bundle / stage.golden.path)
    path = bundle / "golden" / "with-losses.safetensors"
    path.write_bytes(save(tensors, metadata={METADATA: json.dumps(to_json(info))}))
    with_fp16 = replace(stage, artifacts=(fp16, fp32), golden=file_ref(path, bundle))
    save_manifest(replace(manifest, stages={**manifest.stages, "conditioner": with_fp16}), bundle)

    built = build_bundle(tiny_checkpoint, bundle, BuildOptions()).manifest
    kept = built.stages["conditioner"]
    assert kept.artifacts == (fp32, fp16) and kept.golden is not None
    assert read_golden(bundle / kept.golden.path).info.losses == {"fp16": 1e-3}
    other_order = replace(kept, artifacts=(fp16, fp32))
    save_manifest(replace(built, stages={**built.stages, "conditioner": other_order}), bundle)
    assert build_bundle(tiny_checkpoint, bundle, BuildOptions()).manifest == built


def test_another_scheduler_changes_the_manifest_alone(euler_report: BuildReport, tiny_bundle: Path) -> None:
    assert {event.status for event in euler_report.events} == {"reused"}
    old, new = load_manifest(tiny_bundle), euler_report.manifest
    assert (old.scheduler.kind, new.scheduler.kind) == (SchedulerKind.DPMSOLVER, SchedulerKind.EULER)
    assert old.digest != new.digest and old.stages == new.stages


@pytest.mark.parametrize(
    ("component", "rebuilt"), [("text_encoder", {"text_encoder"}), ("transformer", TRANSFORMER), ("vae", VAE)]
)
def test_a_changed_weight_rebuilds_what_depends_on_it(
    checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, component: str, rebuilt: set[str]
) -> None:
    (weights,) = (checkpoint / component).glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 0x40
    weights.write_bytes(content)
    reasons = would_build(checkpoint, bundle, BuildOptions(), monkeypatch)
    assert reasons == dict.fromkeys(rebuilt, "weights changed")


def test_a_build_killed_after_the_tokenizer_changed_leaves_the_old_one(
    checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"]["ditc"] = len(data["model"]["vocab"])
    path.write_text(json.dumps(data))
    old = load_manifest(bundle)

    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(bundle_module, "save_manifest", stop)
        with pytest.raises(Stopped):
            build_bundle(checkpoint, bundle, BuildOptions())
    check_files(bundle, old.all_files())
    new = build_bundle(checkpoint, bundle, BuildOptions()).manifest
    assert new.files != old.files
    assert [p.name for p in (bundle / "tokenizer").iterdir()] == [Path(new.files[0].path).name]


def test_a_changed_config_is_named(checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.5}))
    reasons = would_build(checkpoint, bundle, BuildOptions(), monkeypatch)
    assert reasons == dict.fromkeys(VAE, "config changed")


def test_another_batch_rebuilds_every_stage_whose_profile_has_it(
    tiny_checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = would_build(tiny_checkpoint, bundle, BuildOptions(max_batch=2), monkeypatch)
    assert reasons == dict.fromkeys(ALL, "shapes changed")


def test_another_opset_rebuilds_every_stage(
    tiny_checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = would_build(tiny_checkpoint, bundle, BuildOptions(opset=23), monkeypatch)
    assert reasons == dict.fromkeys(ALL, "opset changed")


def test_other_source_rebuilds_every_stage(
    tiny_checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_artifact, "graph_source", lambda: "0" * 64)
    reasons = would_build(tiny_checkpoint, bundle, BuildOptions(), monkeypatch)
    assert reasons == dict.fromkeys(ALL, "export source changed")


def test_an_edited_comment_rebuilds_nothing(
    tiny_checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comment changes only the text of the source, which decides whether a build compares its stages' inputs."""
    monkeypatch.setattr(noop, "bundle_source", lambda: "0" * 64)
    assert noop.up_to_date(tiny_checkpoint, bundle, BuildOptions()) is None
    assert would_build(tiny_checkpoint, bundle, BuildOptions(), monkeypatch) == {}


def test_a_damaged_graph_is_built_again(
    tiny_checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = bundle / load_manifest(bundle).stages["conditioner"].artifacts[0].file.path
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + b"\0")
    reasons = would_build(tiny_checkpoint, bundle, BuildOptions(), monkeypatch)
    assert reasons == {"conditioner": "its files are missing or damaged"}


def test_a_killed_build_leaves_the_old_bundle_and_resumes(checkpoint: Path, bundle: Path) -> None:
    (weights,) = (checkpoint / "vae").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 0x01
    weights.write_bytes(content)
    before = load_manifest(bundle)

    def die(event: BuildEvent) -> None:
        if event.status == "building":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_bundle(checkpoint, bundle, BuildOptions(), on_event=die)
    assert load_manifest(bundle) == before
    check_files(bundle, before.all_files())


def test_a_checkpoint_that_changes_during_the_build_is_refused(checkpoint: Path, bundle: Path) -> None:
    """Stages of two versions in one bundle would draw noise, each of them correct."""
    before = load_manifest(bundle)
    (weights,) = (checkpoint / "text_encoder").glob("*.safetensors")

    def overwrite(event: BuildEvent) -> None:
        if event.stage == "denoiser":
            content = weights.read_bytes()
            weights.unlink()
            weights.write_bytes(content[:-1] + b"\x3f")

    with pytest.raises(BuildError, match=r"text_encoder.* changed while it was being built"):
        build_bundle(checkpoint, bundle, BuildOptions(), on_event=overwrite)
    assert load_manifest(bundle) == before


def test_two_builds_at_once_are_refused(tiny_checkpoint: Path, bundle: Path) -> None:
    with (
        filelock.FileLock(bundle / FOLDER / "lock"),
        pytest.raises(BuildError, match="another build is working"),
    ):
        build_bundle(tiny_checkpoint, bundle, BuildOptions())


# Refused before anything is written


def test_a_directory_with_other_files_is_refused_and_left_alone(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The build removes files that its manifest does not name, so it must not run in a folder with other files."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "mine.onnx").write_text("precious")
    with pytest.raises(BuildError, match="not empty and not a bundle"):
        build_bundle(tiny_checkpoint, tmp_path, BuildOptions())
    assert [path.name for path in tmp_path.rglob("*")] == ["onnx", "mine.onnx"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (BuildOptions(max_batch=0), UsageError, "max_batch is 0"),
        (BuildOptions(resolution=0), UsageError, "resolution is 0"),
        (BuildOptions(resolution=-64), UsageError, "resolution is -64"),
        (BuildOptions(resolution=65), UsageError, "resolution 65 is not a multiple of 2"),
        (BuildOptions(opset=21), UsageError, "opset is 21"),
        (
            BuildOptions(opset=23, backend=Backend.TENSORRT_RTX),
            UsageError,
            "opset 23 cannot be built into engines",
        ),
    ],
)
def test_options_that_cannot_be_built_are_refused_at_once(
    tiny_checkpoint: Path, tmp_path: Path, options: BuildOptions, error: type[DitcError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        build_bundle(tiny_checkpoint, tmp_path / "bundle", options)
    assert caught.value.hint and not (tmp_path / "bundle").exists()


def test_a_file_in_the_place_of_the_bundle_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("")
    with pytest.raises(BuildError, match="is a file"):
        build_bundle(tiny_checkpoint, tmp_path / "bundle", BuildOptions())


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_write_permission_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write"):
        build_bundle(tiny_checkpoint, tmp_path / "bundle", BuildOptions())


def test_a_folder_of_an_earlier_build_that_cannot_be_written_to_is_refused_before_the_export(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / ".build").mkdir()
    (tmp_path / "golden").touch()  # as little a folder to write to as one that another user owns
    with pytest.raises(OutputError, match=r"cannot write into .*golden: Not a directory"):
        build_bundle(tiny_checkpoint, tmp_path, BuildOptions())
    assert not (tmp_path / "onnx").exists()


def test_a_folder_that_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        build_bundle(tmp_path / "empty", tmp_path / "bundle", BuildOptions())
    assert not (tmp_path / "bundle").exists()


# The command


def test_the_command_tells_what_it_reused(
    tiny_checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny_checkpoint), "-o", str(bundle)]) == 0
    out, err = capsys.readouterr()
    assert f"{bundle}: 0 of 5 stages built" in out
    assert err.count("reused") == 5 and "nothing changed" in err


def test_the_command_with_json_prints_one_object(
    tiny_checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny_checkpoint), "-o", str(bundle), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["digest"] == load_manifest(bundle).digest
    assert {stage["status"] for stage in result["stages"].values()} == {"reused"} and set(
        result["stages"]
    ) == ALL


def test_the_command_ends_with_2_on_wrong_options(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--max-batch", "0"]
    assert main(arguments) == USAGE
    assert capsys.readouterr().err.splitlines()[-1].startswith("hint: ")
