"""A build that signs believes no journal of another hand: tampered weights with an edited journal got its signature."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditc.export.build import builder
from ditc.export.build.builder import build_bundle
from ditc.export.build.context import BuildContext
from ditc.export.build.graph_artifact import stage_inputs
from ditc.export.build.journal import Journal
from ditc.export.build.noop import up_to_date
from ditc.export.build.records import GoldenRecord, Record, RequestRecord, StageRecord
from ditc.export.contract import BuildOptions
from ditc.runtime.bundle.build_cost import record_path
from ditc.runtime.bundle.integrity import file_ref
from ditc.runtime.bundle.manifest import load_manifest, save_manifest
from ditc.runtime.bundle.signature import SIGNATURE, load_private_key
from ditc.runtime.cli import USAGE, main
from ditc.runtime.errors import BuildError
from ditc.runtime.spec import DENOISER, Precision

KINDS = (StageRecord, GoldenRecord, RequestRecord)
UNSIGNED = "the record of its last build is not signed with this key"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    """The file of a new private key."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "key.pem"
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(*form))
    return path


@pytest.fixture
def key(pem: Path) -> Any:
    return load_private_key(pem)


def records(bundle: Path) -> list[Record]:
    """Every record of the journal, as a build that does not sign reads it."""
    journal = Journal(bundle)
    names = [path.stem.rpartition("-")[::2] for path in journal.records()]
    return [r for name in names for kind in KINDS if (r := journal.record(kind, *name)) is not None]


def as_if_signed(bundle: Path, key: Any) -> None:
    """Make the journal what a build with this key would have left."""
    for record in records(bundle):
        Journal(bundle, key).write(record)


def tamper(bundle: Path) -> None:
    """Change the denoiser's weights, and everything that can be rewritten without a key, so that all of it fits."""
    manifest, journal = load_manifest(bundle), Journal(bundle)
    stage = manifest.stages[DENOISER]
    (artifact,) = stage.artifacts
    path = bundle / artifact.data[0].path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = replace(artifact, data=(file_ref(path, bundle),))
    stages = {**manifest.stages, DENOISER: replace(stage, artifacts=(changed,))}
    save_manifest(replace(manifest, stages=stages), bundle)
    for record in records(bundle):
        if isinstance(record, StageRecord) and record.inputs.stage == DENOISER:
            journal.write(replace(record, artifact=changed))
        if isinstance(record, RequestRecord):
            journal.write(replace(record, manifest=load_manifest(bundle).digest))


class Stopped(Exception):
    """Raised in place of writing the manifest."""


def to_build(checkpoint: Path, bundle: Path, key: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The stages that a build with the key would make, with its reasons, found without making them."""
    reasons: dict[str, str] = {}

    def note(build: BuildContext, name: str) -> None:
        inputs = stage_inputs(build, name)
        if build.journal.finished(StageRecord, inputs) is None:
            reasons[name] = build.journal.why(StageRecord, inputs)

    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(builder, "graph_artifact", note)
        patch.setattr(builder, "assemble", stop)
        with pytest.raises(Stopped):
            build_bundle(checkpoint, bundle, BuildOptions(), key=key)
    return reasons


def test_a_journal_that_this_key_did_not_sign_is_not_believed(
    tiny_checkpoint: Path, bundle: Path, key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper(bundle)
    assert (
        up_to_date(tiny_checkpoint, bundle, BuildOptions()) is not None
    )  # without a signature it is, as documented
    assert up_to_date(tiny_checkpoint, bundle, BuildOptions(), key=key) is None
    assert to_build(tiny_checkpoint, bundle, key, monkeypatch) == dict.fromkeys(
        load_manifest(bundle).stages, UNSIGNED
    )


def test_what_this_key_signed_is_reused_and_what_was_changed_since_is_built_again(
    tiny_checkpoint: Path, bundle: Path, key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_signed(bundle, key)
    assert up_to_date(tiny_checkpoint, bundle, BuildOptions(), key=key) is not None
    assert to_build(tiny_checkpoint, bundle, key, monkeypatch) == {}
    tamper(bundle)
    assert up_to_date(tiny_checkpoint, bundle, BuildOptions(), key=key) is None
    assert to_build(tiny_checkpoint, bundle, key, monkeypatch) == {DENOISER: UNSIGNED}


def test_a_signed_record_counts_only_under_its_own_name(bundle: Path, key: Any) -> None:
    as_if_signed(bundle, key)
    first, second = (
        r
        for r in records(bundle)
        if isinstance(r, StageRecord) and r.inputs.stage in (DENOISER, "vae_decoder")
    )
    ours, other = (record_path(bundle, r.inputs.record_name, r.artifact.key) for r in (first, second))
    for suffix in ("", ".sig"):
        shutil.copyfile(f"{other}{suffix}", f"{ours}{suffix}")
    for journal in (Journal(bundle), Journal(bundle, key)):
        assert journal.record_of(StageRecord, first.inputs) is None
        assert journal.record_of(StageRecord, second.inputs) == second


def test_stored_hashes_do_not_count_for_a_signature(tiny_checkpoint: Path, bundle: Path, key: Any) -> None:
    """The weights are exchanged, and inputs.json says that they have the old hash."""
    as_if_signed(bundle, key)
    path = bundle / load_manifest(bundle).stages[DENOISER].artifacts[0].data[0].path
    journal = Journal(bundle)
    for ref in load_manifest(bundle).all_files():
        journal.hashes.of(bundle / ref.path)
    journal.hashes.save()
    content, before = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert up_to_date(tiny_checkpoint, bundle, BuildOptions()) is not None
    assert up_to_date(tiny_checkpoint, bundle, BuildOptions(), key=key) is None


def test_the_command_signs_what_is_on_the_disk(
    tiny_checkpoint: Path,
    bundle: Path,
    pem: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    as_if_signed(bundle, load_private_key(pem))
    command = ["build", str(tiny_checkpoint), "-o", str(bundle), "--sign", str(pem)]
    assert main(command) == 0
    signed = json.loads((bundle / SIGNATURE).read_text())
    assert signed["digest"] == load_manifest(bundle).digest
    (bundle / SIGNATURE).unlink()
    report = up_to_date(tiny_checkpoint, bundle, BuildOptions())
    monkeypatch.setattr("ditc.export.build.noop.up_to_date", lambda *_, **__: report)
    tamper(bundle)  # after the build, before it signs
    assert main(command) == USAGE and not (bundle / SIGNATURE).exists()
    assert "has been changed" in capsys.readouterr().err


def test_a_build_that_signs_removes_nothing_that_it_cannot_vouch_for(
    tiny_checkpoint: Path, bundle: Path, key: Any
) -> None:
    with pytest.raises(BuildError, match=r"denoiser fp32 onnxruntime of builds that did not sign") as caught:
        build_bundle(tiny_checkpoint, bundle, BuildOptions(precision=Precision.FP16), key=key)
    assert "ditc sign" in str(caught.value.hint) and load_manifest(bundle)
