"""inspect, verify and doctor: what they show about a bundle and about this machine."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest

from ditc.runtime import cli
from ditc.runtime.bundle.certificate import Line
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.bundle.selftest import describe
from ditc.runtime.cli import USAGE, main

FAST = ["--steps", "1", "--threads", "1"]


def draw(bundle: Path, *arguments: str) -> int:
    return main(["run", str(bundle), *arguments, *FAST])


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.strip().splitlines()


def test_inspect_tells_stages_and_defaults(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle)]) == 0
    out = capsys.readouterr().out
    assert all(stage in out for stage in load_manifest(tiny_bundle).stages)
    assert "64x64 (no resolution bins), 4 steps of flow_dpmsolver_multistep, guidance_scale 3.0" in out


def test_inspect_fits_a_terminal_of_80_columns(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")  # 80 columns, no escape sequences
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["inspect", str(tiny_bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.startswith("stage ")]
    stages = load_manifest(tiny_bundle).stages
    rows = [line for line in lines[head:] if len(line) <= 80 and line.split() and line.split()[0] in stages]
    assert [row.split()[:3] for row in rows if " takes " not in row] == [
        [name, "fp32", "onnxruntime"] for name in stages
    ]
    assert "vae_decoder takes latents(batch,8,height,width)" in lines


def test_progress_leaves_no_empty_line_where_there_is_no_terminal(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(tiny_bundle, "cat", "-o", str(tmp_path / "x.png")) == 0
    assert main(["verify", str(tiny_bundle)]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if not line.strip()] == []


@pytest.mark.parametrize("choice", [["--backend", "nonsense"], ["--precision", "fp16"]])
def test_verify_refuses_options_of_its_run_without_run(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], choice: list[str]
) -> None:
    assert main(["verify", str(tiny_bundle), *choice]) == USAGE
    assert errors(capsys)[-1] == "hint: add --run"


def test_the_hint_of_an_unknown_backend_names_those_that_run_a_bundle(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(tiny_bundle, "cat", "-o", str(tmp_path / "x.png"), "--backend", "torch") == USAGE
    assert errors(capsys) == [
        "error: backend 'torch' is unknown",
        "hint: choose one of auto, tensorrt, tensorrt-rtx, openvino, onnxruntime",
    ]


def test_inspect_prints_a_path_with_brackets_as_it_is(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bundle, "a[bold]b")
    assert main(["inspect", "a[bold]b"]) == 0
    assert capsys.readouterr().out.startswith("a[bold]b ")


def test_inspect_as_json_is_the_manifest(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tiny_bundle / "manifest.json").read_text())


def test_verify_passes_a_whole_bundle_and_names_a_changed_file(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    assert main(["verify", str(bundle), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"] == len(list(load_manifest(bundle).all_files()))
    assert result["digest"] == load_manifest(bundle).digest
    artifact = load_manifest(bundle).stages["denoiser"].artifacts[0]
    assert artifact.weights is not None
    weights = bundle / artifact.weights.path
    weights.write_bytes(weights.read_bytes().replace(b"red", b"der", 1) + b" ")
    assert main(["verify", str(bundle)]) == USAGE
    assert artifact.weights.path in errors(capsys)[0]


def test_doctor_finds_what_this_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    topics = {finding["topic"] for finding in findings}
    assert {"machine", "disk", "runtime", "export", "runs", "providers"} <= topics
    assert code == int(any(finding["ok"] is False for finding in findings))
    assert main(["doctor"]) == code
    assert "onnxruntime: ONNX Runtime is installed" in capsys.readouterr().out


def test_doctor_takes_the_gpu_build_of_onnx_runtime_for_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditc.runtime.commands import doctor

    versions = {"onnxruntime": None, "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(doctor, "_installed", lambda name: versions.get(name, "1.0"))
    (runtime,) = [finding for finding in doctor._packages() if finding.topic == "runtime"]
    assert runtime.ok and "onnxruntime-gpu 1.31.1" in runtime.text


def test_a_warning_is_shown_once_and_progress_every_time() -> None:
    """Every encoding of a text that is too long warns that it is cut, and parity encodes each text a dozen times."""
    once = cli._Once()

    def shown(level: int, text: str) -> bool:
        return once.filter(logging.LogRecord("ditc", level, __file__, 1, "%s is cut", (text,), None))

    assert [shown(logging.WARNING, text) for text in ("a", "a", "b", "a")] == [True, False, True, False]
    assert [shown(logging.INFO, "a") for _ in range(2)] == [True, True]


def test_the_longest_name_of_a_stage_leaves_room_for_its_verdict() -> None:
    line = Line(name="text_encoder_3", metric="relative L2", value=1e-7, bound=1e-5, passed=True, detail="")
    assert describe(line).split()[:2] == ["text_encoder_3", "pass"]
