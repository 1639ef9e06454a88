"""The verb: measures, merges, and refuses what it cannot serve before any work."""

from __future__ import annotations

import pytest

from ditc.export.quant.ranges import load_ranges
from ditc.runtime.cli import USAGE, main


def test_measuring_in_shards_and_merging_them(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red heart\nblue cat\n")
    common = ["calibrate", str(tiny_checkpoint), "--prompts", str(tmp_path / "p.txt"), "--steps", "1"]
    parts = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for i, part in enumerate(parts):
        assert main([*common, "-o", part, "--shard", f"{i}/2"]) == 0
    assert main([*common, "-o", str(tmp_path / "r.safetensors"), "--merge", *parts]) == 0
    assert "2 prompts of 2 files" in capsys.readouterr().out
    assert len(load_ranges(tmp_path / "r.safetensors").prompts) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "ranges.bin"], "not a .safetensors"),
        (["-o", "r.safetensors", "--shard", "2/2"], "no such part"),
        (["-o", "r.safetensors", "--shard", "half"], "not I/N"),
        (["-o", "r.safetensors", "--steps", "0"], "steps is 0"),
        (["-o", "r.safetensors", "--num-prompts", "0"], "num-prompts is 0"),
        (["-o", "r.safetensors", "--budget", "ssim=1"], "neither psnr=DB"),
        (["-o", "r.safetensors", "--formats", "int4"], "take int8, fp8"),
        (["-o", "r.safetensors", "--prompts", "missing.txt"], "cannot read prompts"),
    ],
)
def test_bad_arguments_are_refused_with_a_hint(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "nowhere", *arguments]) == USAGE
    error = capsys.readouterr().err
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_place_that_takes_no_file_is_refused_before_any_work(tmp_path, capsys):
    place = tmp_path / "folder.safetensors"
    place.mkdir()
    assert main(["calibrate", "nowhere", "-o", str(place)]) == USAGE
    assert f"cannot write {place}: it is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused_before_any_work(tmp_path, capsys, device):
    arguments = ["calibrate", "nowhere", "-o", str(tmp_path / "r.safetensors"), "--device", device]
    assert main(arguments) == USAGE
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: PyTorch cannot compute on '{device}': "
    )  # no bar, where there is no terminal
    assert "hint: take cpu" in error
