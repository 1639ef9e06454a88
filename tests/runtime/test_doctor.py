"""ditc doctor: defects of installed versions, the missing link, and whether a checkpoint can be built here."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditc.runtime.cli import USAGE, main
from ditc.runtime.commands import doctor, doctor_engines
from ditc.runtime.commands.doctor_finding import Finding
from ditc.runtime.gpu import Gpu


def test_a_version_with_a_known_defect_is_bad_and_has_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_engines, "_version", {"tensorrt": "11.3.0.14"}.get)
    (finding,) = doctor_engines.known_bad()
    assert finding.ok is False and "11.3.0.14" in finding.text and finding.hint


def test_the_wheels_missing_link_is_found_until_it_is_made(tmp_path: Path) -> None:
    (tmp_path / "libtensorrt_rtx.so.1").write_bytes(b"")
    (finding,) = doctor_engines.missing_link(tmp_path)
    assert (
        "is missing" in finding.text
        and finding.hint
        and f"ln -s {doctor_engines.RTX_LIBRARY}.1" in finding.hint
    )
    (tmp_path / doctor_engines.RTX_LIBRARY).write_bytes(b"")
    assert not doctor_engines.missing_link(tmp_path)


@pytest.mark.parametrize(
    ("gpu", "text"),
    [
        (None, "none: engines can be built here"),
        (Gpu("NVIDIA L40", "sm89"), "sm89: supported by tensorrt-rtx and tensorrt"),
        (Gpu("NVIDIA H100", "sm90"), "sm90: not supported by tensorrt-rtx"),
    ],
)
def test_the_gpu_is_shown_with_the_backends_that_support_it(gpu: Gpu | None, text: str) -> None:
    (finding,) = doctor_engines._gpu(gpu)
    assert text in finding.text


def test_a_backend_that_cannot_run_is_shown_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = {"tensorrt": "tensorrt is not installed", "tensorrt-rtx": "", "onnxruntime": ""}
    monkeypatch.setattr(doctor_engines, "missing", lacks.get)
    (finding,) = doctor_engines._runs()
    assert finding.text == "tensorrt: tensorrt is not installed" and finding.ok is None


def test_free_disk_and_memory_are_compared_with_what_a_checkpoint_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    with weights.open("wb") as file:
        file.truncate(10**10)  # sparse
    monkeypatch.setattr(doctor, "_memory_gb", lambda: (12.0, 24.0))
    disk, memory = doctor.checkpoint_findings(tmp_path)
    assert "20.0 GB of disk" in disk.text
    assert memory.ok is False and "36.3 GB of memory (for transformer); 12.0 GB are free" in memory.text


def test_a_folder_without_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == USAGE
    assert "holds no .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("saturates", [True, False])
def test_a_cpu_without_vnni_has_a_hint(monkeypatch: pytest.MonkeyPatch, saturates: bool) -> None:
    monkeypatch.setattr(doctor, "cpu_features", lambda: ("avx2",))
    monkeypatch.setattr(doctor, "int8_products_saturate", lambda: saturates)
    (finding,) = [finding for finding in doctor._machine() if finding.topic == "cpu"]
    assert finding.text == "has avx2" and ("no VNNI" in (finding.hint or "")) is saturates


@pytest.mark.parametrize(
    ("ok", "line"), [(None, "Nothing is wrong."), (False, "Look at the lines that begin with bad: package.")]
)
def test_the_last_line_says_whether_anything_is_wrong(ok: bool | None, line: str) -> None:
    findings = [Finding("machine", "2 CPUs"), *[Finding("package", "x", ok)] * 2]
    assert doctor.summary(findings).startswith(line)
