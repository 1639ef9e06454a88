"""--variant: every command reads a checkpoint whose weight files all have a variant's name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ditc.export.build import graph_artifact
from ditc.export.checkpoint.open import open_checkpoint
from ditc.parity.reference.upstream import Upstream
from ditc.runtime.cli import USAGE, main


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared checkpoint with its weight files renamed to a variant; the values are the same."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("variant") / tiny_checkpoint.name))
    for path in list(copy.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    return copy


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out.safetensors")


def test_without_the_option_the_error_names_it(checkpoint: Path, output: str, capsys) -> None:
    assert main(["build", str(checkpoint), "-o", output]) == USAGE
    assert "--variant" in capsys.readouterr().err


def test_a_build_reads_the_variant(checkpoint: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class ExportHasBegun(Exception):
        pass

    def export(*_: object, **__: object) -> None:
        raise ExportHasBegun

    monkeypatch.setattr(graph_artifact, "to_onnx", export)
    with pytest.raises(ExportHasBegun):
        main(["build", str(checkpoint), "-o", output, "--variant", "fp16"])


def test_calibrate_measures_the_variant(checkpoint: Path, output: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.txt").write_text("a red heart\n")
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--steps", "1", "--variant", "fp16"]
    assert main(["calibrate", str(checkpoint), "-o", output, *arguments]) == 0
    assert "1 prompts x 1 steps" in capsys.readouterr().out


def test_convert_writes_the_variant_under_native_names(checkpoint: Path, output: str) -> None:
    assert main(["convert", str(checkpoint), output, "--to-native", "--variant", "fp16"]) == 0
    assert Path(output).is_file()


def test_parity_compares_a_bundle_with_the_variant(checkpoint: Path, tiny_bundle: Path, capsys) -> None:
    arguments = ["--against", str(checkpoint), "--variant", "fp16", "--level", "graph"]
    assert main(["parity", str(tiny_bundle), *arguments]) == 0
    assert "PASS" in capsys.readouterr().out


def test_diffusers_reads_the_variant_as_the_second_reference(checkpoint: Path) -> None:
    assert Upstream(open_checkpoint(checkpoint, variant="fp16")).networks()
