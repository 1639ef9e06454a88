"""SD3 and lucidrains/mmdit in 8 bits through a user's commands: ditc calibrate, ditc build, ditc run, ditc inspect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import main
from ditc.runtime.spec import DENOISER

# One block with the second attention, and the last block, which lacks parts of the text stream.
BLOCKS = 2
# The first: q, k, v, out of both streams; the second attention; two feed-forwards. The last: the same without the
# second attention, the text's out and the text's feed-forward.
SD3_LAYERS = (8 + 4 + 4) + (8 + 2 - 1)


def build(checkpoint: Path, bundle: Path, precision: str, *options: str) -> int:
    return main(["build", str(checkpoint), "-o", str(bundle), "--precision", precision, *options])


def calibrate(checkpoint: Path, ranges: Path) -> Path:
    prompts = ranges.with_suffix(".txt")
    prompts.write_text("a red cat\nblue\n")
    arguments = ["--prompts", str(prompts), "--steps", "2"]
    assert main(["calibrate", str(checkpoint), "-o", str(ranges), *arguments]) == 0
    return ranges


def check(bundle: Path, recipe: str, layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundle holds the recipe's denoiser with that many layers in 8 bits, and draws with it."""
    precision = recipe.rpartition("-")[2]
    (artifact,) = [a for a in load_manifest(bundle).stages[DENOISER].artifacts if a.precision == precision]
    assert artifact.recipe == recipe and artifact.quantization is not None
    record = json.loads((bundle / artifact.quantization.path).read_text())
    assert len(record["layers"]) == layers
    picture = tmp_path / f"{recipe}.png"
    assert (
        main(["run", str(bundle), "cat", "-o", str(picture), "--precision", precision, "--steps", "2"]) == 0
    )
    assert picture.is_file()
    capsys.readouterr()
    assert main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert f"calibration: denoiser {precision}: ranges of 2 prompts x 2 steps" in shown
    assert "doubt: the ranges rest on 2 prompt(s)" in shown


@pytest.fixture(scope="module")
def small(sd3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared checkpoint with fewer blocks; a build reuses text encoders and VAE of its bundle."""
    directory = tmp_path_factory.mktemp("small") / "checkpoint"
    shutil.copytree(sd3_checkpoint, directory)
    whole = SD3Transformer2DModel.from_pretrained(directory / "transformer")
    torch.manual_seed(1)
    shutil.rmtree(directory / "transformer")
    settings = {**whole.config, "num_layers": BLOCKS, "dual_attention_layers": (0,)}
    SD3Transformer2DModel.from_config(settings).save_pretrained(directory / "transformer")
    (directory / "ditc.json").write_text('{"max_sequence_length": 16}\n')
    return directory


@pytest.fixture(scope="module")
def ranges(small: Path) -> Path:
    return calibrate(small, small.parent / "ranges.safetensors")


@pytest.mark.parametrize("precision", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_sd3_is_calibrated_built_and_run_in_8_bits(
    small: Path, sd3_bundle: Path, ranges: Path, precision: str, tmp_path: Path, capsys
) -> None:
    bundle = Path(shutil.copytree(sd3_bundle, tmp_path / "bundle"))
    assert build(small, bundle, precision, "--ranges", str(ranges)) == 0
    said = capsys.readouterr()
    assert f"sd3-{precision}" in said.out + said.err
    check(bundle, f"sd3-{precision}", SD3_LAYERS, tmp_path, capsys)


def test_sd3_without_ranges_is_refused_with_a_hint_and_nothing_is_built(
    small: Path, tmp_path: Path, capsys
) -> None:
    assert build(small, tmp_path / "bundle", "int8") == 2
    error = capsys.readouterr().err
    assert "recipe sd3-int8 quantizes activations and needs --ranges" in error
    assert "ditc calibrate" in error and not (tmp_path / "bundle").exists()


def test_ranges_of_another_network_are_refused(ranges: Path, sd3_checkpoint: Path, tmp_path, capsys) -> None:
    assert build(sd3_checkpoint, tmp_path / "bundle", "int8", "--ranges", str(ranges)) == 2
    assert "was measured on other weights" in capsys.readouterr().err


def test_a_lucidrains_trunk_is_calibrated_built_and_run_in_8_bits(
    mmdit_checkpoint: Path, mmdit_bundle: Path, tmp_path: Path, capsys
) -> None:
    found = calibrate(mmdit_checkpoint, tmp_path / "ranges.safetensors")
    bundle = Path(shutil.copytree(mmdit_bundle, tmp_path / "bundle"))
    assert build(mmdit_checkpoint, bundle, "int8", "--ranges", str(found)) == 0
    said = capsys.readouterr()
    assert "against the unquantized bundle" in said.out + said.err
    check(bundle, "mmdit-int8", 2 * 2 + 2 + 1 + 2 * 2 + 2, tmp_path, capsys)
