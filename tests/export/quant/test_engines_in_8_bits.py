"""ditc build --backend tensorrt-rtx --precision int8|fp8: engines of 8-bit graphs, built on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditc.calib.collect import Settings, collect
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import main
from ditc.runtime.spec import DENOISER, Backend

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def ranges(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranges of the tiny checkpoint."""
    path = tmp_path_factory.mktemp("ranges") / "r.safetensors"
    collect(tiny_checkpoint, ["a red heart"], path, Settings(num_inference_steps=1))
    return path


def build(checkpoint: Path, out: Path, ranges: Path, precision: str, *targets: str) -> int:
    """The command's exit code."""
    engine = ["--backend", "tensorrt-rtx", *targets]
    return main(
        [
            *("build", str(checkpoint), "-o", str(out), *engine),
            *("--precision", precision, "--ranges", str(ranges)),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "targets", "expected"),
    [("int8", ("--targets", "sm86,sm120"), ("sm86", "sm120")), ("fp8", (), ("sm89", "sm120"))],
)
def test_the_command_builds_engines_of_8_bit_graphs(
    tiny_checkpoint: Path,
    ranges: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    targets: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    assert build(tiny_checkpoint, tmp_path / "bundle", ranges, precision, *targets) == 0
    assert f"sana-{precision}: " in capsys.readouterr().err  # the coverage report
    manifest = load_manifest(tmp_path / "bundle")
    engine = next(a for a in manifest.stages[DENOISER].artifacts if a.backend is Backend.TENSORRT_RTX)
    assert (engine.precision.value, engine.recipe, engine.targets) == (
        precision,
        f"sana-{precision}",
        expected,
    )
    assert (tmp_path / "bundle" / engine.file.path).stat().st_size > 0


def test_fp8_for_a_target_without_it_is_refused_before_any_work(
    tiny_checkpoint: Path, ranges: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(tiny_checkpoint, tmp_path / "bundle", ranges, "fp8", "--targets", "sm86,sm89") != 0
    error = capsys.readouterr().err
    assert "sm86 cannot run fp8" in error and "sm89" in error
    assert not (tmp_path / "bundle").exists()
