"""The certificate and the self-test: written, shown, required, and not valid for other files or machines."""

from __future__ import annotations

import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from records import parity_record, self_test_record

from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.bundle.certificate import (
    Certificate,
    add_record,
    load_certificate,
    read_certificate,
    save_certificate,
)
from ditc.runtime.bundle.certification import Certification
from ditc.runtime.bundle.golden import read_golden, self_test
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.bundle.safetensors import read_safetensors
from ditc.runtime.cli import main
from ditc.runtime.errors import BundleError
from ditc.runtime.loader import choose
from ditc.runtime.machine import this_machine
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import ComputeDevice
from ditc.runtime.sessions.onnxruntime import DEVICES
from ditc.runtime.spec import DENOISER


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    return copy


def test_verify_run_tests_every_stage_and_records_the_machine(bundle, capsys) -> None:
    assert main(["verify", str(bundle), "--run"]) == 0
    out = capsys.readouterr().out
    assert out.count("pass") == 4
    (entry,) = json.loads((bundle / "certificate.json").read_text())["entries"]
    assert entry["machine"]["cpus"] == this_machine().cpus
    assert all(line["value"] <= line["bound"] for line in entry["self_test"]["lines"])


def test_golden_files_are_small_and_whole(bundle) -> None:
    manifest = load_manifest(bundle)
    refs = [stage.golden for stage in manifest.stages.values()]
    assert all(refs)
    assert sum(ref.size_bytes for ref in refs) <= 2e6


def test_the_self_test_fails_where_a_stage_computes_something_else(bundle, other_checkpoint) -> None:
    manifest = load_manifest(bundle)
    artifact = manifest.stages[DENOISER].artifacts[0]
    golden = read_golden(bundle / manifest.stages[DENOISER].golden.path)
    line = self_test(DENOISER, TorchModel(other_checkpoint).sessions[DENOISER], artifact, golden)
    assert line.passed is False
    assert line.value > 100 * line.bound


@pytest.mark.parametrize("left", ["none", "one", "NaN"])
def test_a_golden_file_without_outputs_that_can_be_compared_is_not_checked(bundle, left: str) -> None:
    manifest = load_manifest(bundle)
    artifact = manifest.stages[DENOISER].artifacts[0]
    golden = read_golden(bundle / manifest.stages[DENOISER].golden.path)
    name = artifact.spec.outputs[0].name
    outputs = {
        "none": {},
        "one": {name: golden.outputs[name]},
        "NaN": {**golden.outputs, name: golden.outputs[name] * np.nan},
    }[left]
    with Pipeline.load(bundle, threads=1) as pipeline:
        line = self_test(DENOISER, pipeline.sessions[DENOISER], artifact, replace(golden, outputs=outputs))
    assert (line.passed, line.value) == (None, None)


def test_a_changed_golden_file_is_refused_before_anything_runs(bundle, capsys) -> None:
    path = next((bundle / "golden").glob("denoiser-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(bundle), "--run"]) == 2
    assert path.name in capsys.readouterr().err


def test_run_warns_without_a_certificate_and_refuses_where_one_is_required(bundle, caplog, capsys) -> None:
    draw = [
        "run",
        str(bundle),
        "a red heart",
        "--steps",
        "1",
        "--seed",
        "0",
        "-o",
        str(bundle.parent / "out.png"),
    ]
    with caplog.at_level(logging.WARNING):
        assert main(draw) == 0
    assert "not certified" in caplog.text
    assert main([*draw, "--require-certificate"]) == 2
    assert "ditc parity" in capsys.readouterr().err
    manifest = load_manifest(bundle)
    artifacts, _ = choose(manifest)
    passed = parity_record(manifest)
    save_certificate(bundle, load_certificate(bundle, manifest).with_record(artifacts, parity=passed))
    caplog.clear()
    assert main([*draw, "--require-certificate"]) == 0
    assert "not certified" not in caplog.text


def test_a_certificate_is_valid_for_its_files_and_machine_only(bundle) -> None:
    manifest = load_manifest(bundle)
    artifacts, _ = choose(manifest)

    def why(certificate: Certificate, of=artifacts) -> str:
        return Certification(certificate=certificate, manifest=manifest, artifacts=of).why_uncertified()

    proven = Certificate(manifest=manifest.digest).with_record(artifacts, parity=parity_record(manifest))
    assert why(proven) == ""
    denoiser = artifacts[DENOISER]
    other = {**artifacts, DENOISER: replace(denoiser, file=replace(denoiser.file, sha256="0" * 64))}
    assert "no parity result for these artifacts" in why(proven, other)
    elsewhere = replace(proven.entries[0], machine=replace(this_machine(), processor="another"))
    moved = replace(proven, entries=(elsewhere,))
    assert "another machine" in why(moved)
    assert why(moved.with_record(artifacts, self_test=self_test_record(artifacts))) == ""
    partly = self_test_record(set(artifacts) - {DENOISER})
    assert "the self-test here did not check denoiser" in why(moved.with_record(artifacts, self_test=partly))
    failed = self_test_record(artifacts, passed=False)
    assert "failed on this machine" in why(moved.with_record(artifacts, self_test=failed))


def test_a_certificate_of_another_manifest_is_ignored(bundle) -> None:
    manifest = load_manifest(bundle)
    artifacts, _ = choose(manifest)
    passed = parity_record(manifest)
    save_certificate(bundle, Certificate(manifest="0" * 64).with_record(artifacts, parity=passed))
    assert load_certificate(bundle, manifest).entries == ()


@pytest.mark.parametrize("damaged", ["", "{", '{"manifest": 3}', "[" * 100_000])
def test_a_damaged_certificate_is_a_warning_and_the_next_result_replaces_it(
    bundle, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    (bundle / "certificate.json").write_text(damaged)
    Pipeline.load(bundle, threads=1).close()
    assert "certificate.json" in caplog.text and "it is ignored" in caplog.text
    with pytest.raises(BundleError, match="no parity result"):
        Pipeline.load(bundle, threads=1, require_certificate=True)
    manifest = load_manifest(bundle)
    artifacts, _ = choose(manifest)
    passed = self_test_record(artifacts)
    add_record(bundle, manifest, artifacts, self_test=passed)
    assert [entry.self_test for entry in load_certificate(bundle, manifest).entries] == [passed]


def test_a_certificate_that_cannot_be_written_stops_neither_the_first_use_nor_the_result(
    bundle, caplog: pytest.LogCaptureFixture, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / "certificate.json").mkdir()  # stands for read-only storage, which the superuser could write to
    monkeypatch.setitem(DEVICES, "CPUExecutionProvider", ComputeDevice(kind="cuda", name="a GPU"))
    Pipeline.load(bundle, threads=1).close()
    assert "the result of the self-test is not kept" in caplog.text
    assert main(["verify", str(bundle), "--run", "--threads", "1"]) == 0
    assert DENOISER in capsys.readouterr().out


def test_processes_of_the_same_number_do_not_tear_the_certificate(
    bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As containers that share a volume: each has the process number 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    manifest = load_manifest(bundle)
    artifacts, _ = choose(manifest)

    def write_and_read(turn: int) -> int:
        add_record(bundle, manifest, artifacts, self_test=self_test_record(artifacts, passed=bool(turn % 2)))
        return len(read_certificate(bundle).entries)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(write_and_read, range(64))) == {1}
    assert not list(bundle.glob(".certificate*"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8 + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (70).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}'.ljust(70)
        + b"\0" * 16,
        (70).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}'.ljust(70)
        + b"\0" * 16,
        (70).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}'.ljust(70)
        + b"\0" * 16,
        (70).to_bytes(8, "little")
        + b'{"a":{"dtype":"XX","shape":[4],"data_offsets":[0,16]}}'.ljust(70)
        + b"\0" * 16,
    ],
    ids=["empty", "huge header", "no object", "past the end", "negative", "wrong size", "unknown type"],
)
def test_a_hostile_golden_file_is_refused(data, tmp_path) -> None:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(data)
    with pytest.raises(BundleError, match="is not a safetensors file"):
        read_safetensors(path)


def test_the_reader_gives_what_the_safetensors_package_wrote(tmp_path) -> None:
    from safetensors.numpy import save_file

    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1, 2]),
        "c": np.array(2.5, np.float16),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"k": "v"})
    found, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"}
    assert all(np.array_equal(found[name], array) for name, array in tensors.items())
