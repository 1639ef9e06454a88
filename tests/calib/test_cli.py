"""`ditc calibrate` measures, merges, searches, and refuses bad input before any work."""

from __future__ import annotations

import pytest
from tiny_sana import make_checkpoint

from ditc.export.quant.ranges import load_ranges
from ditc.runtime.cli import USAGE, main


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    """The same networks with other weights."""
    return make_checkpoint(tmp_path_factory.mktemp("other") / "checkpoint", seed=1)


@pytest.fixture(scope="module")
def shards(tiny_checkpoint, tmp_path_factory):
    """Ranges of two prompts, in one file per prompt."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "p.txt").write_text("a red heart\nblue cat\n")
    common = ["calibrate", str(tiny_checkpoint), "--prompts", str(folder / "p.txt"), "--steps", "1"]
    parts = [str(folder / f"{i}.safetensors") for i in range(2)]
    for i, part in enumerate(parts):
        assert main([*common, "-o", part, "--shard", f"{i}/2"]) == 0
    return parts


def test_shards_are_merged_without_the_checkpoint(shards, tmp_path, capsys, caplog):
    assert main(["calibrate", "-o", str(tmp_path / "r.safetensors"), "--merge", *shards]) == 0
    said = capsys.readouterr().out
    assert "2 prompts of 2 files" in said and "ranges of 2 prompts x 1 steps" in said
    assert "the ranges rest on 2 prompt(s)" in caplog.text
    assert len(load_ranges(tmp_path / "r.safetensors").prompts) == 2


def test_processes_measure_what_one_process_measures(shards, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red heart\nblue cat\n")
    out, merged = tmp_path / "r.safetensors", tmp_path / "merged.safetensors"
    options = ["--prompts", str(tmp_path / "p.txt"), "--steps", "1", "--workers", "2"]
    assert main(["calibrate", str(tiny_checkpoint), "-o", str(out), *options]) == 0
    assert "2 prompts x 1 steps of 2 processes" in capsys.readouterr().out
    assert main(["calibrate", "-o", str(merged), "--merge", *shards]) == 0
    assert out.read_bytes() == merged.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"p.txt", out.name, merged.name}


def test_a_process_that_fails_is_named(tmp_path, capsys, monkeypatch):
    import argparse

    from ditc.calib.commands.shards import _OPTIONS, measure_in_processes
    from ditc.runtime.errors import SessionError

    nothing = dict.fromkeys(_OPTIONS)
    arguments = argparse.Namespace(checkpoint=tmp_path / "none", output=tmp_path / "r.safetensors", **nothing)
    with pytest.raises(SessionError, match="shard 0/2 ended with exit code 2: error: "):
        measure_in_processes(arguments, 2)


def test_a_budget_is_searched_for_in_merged_ranges_too(shards, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red heart\n")
    out = tmp_path / "r.safetensors"
    search = ["--budget", "psnr=1", "--prompts", str(tmp_path / "p.txt"), "--search-minutes", "0"]
    assert main(["calibrate", str(tiny_checkpoint), "-o", str(out), *search, "--merge", *shards]) == 0
    assert "<- chosen, psnr=1" in capsys.readouterr().out
    assert out.with_suffix(".mixed.json").is_file()


def test_ranges_of_other_weights_are_not_searched(shards, other_weights, tmp_path, capsys):
    out = tmp_path / "r.safetensors"
    search = ["--budget", "psnr=1", "--merge", *shards]
    assert main(["calibrate", str(other_weights), "-o", str(out), *search]) == USAGE
    assert "was measured on other weights" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("arguments", [[], ["--budget", "psnr=1", "--merge", "r.safetensors"]])
def test_measuring_and_searching_need_a_checkpoint(tmp_path, capsys, arguments):
    assert main(["calibrate", "-o", str(tmp_path / "r.safetensors"), *arguments]) == USAGE
    assert "calibrate has no checkpoint to run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "ranges.bin"], "not a .safetensors"),
        (["-o", "r.safetensors", "--shard", "2/2"], "no such part"),
        (["-o", "r.safetensors", "--shard", "half"], "not I/N"),
        (["-o", "r.safetensors", "--workers", "0"], "--workers is 0"),
        (["-o", "r.safetensors", "--workers", "2", "--shard", "0/2"], "--workers and --shard are both given"),
        (["-o", "r.safetensors", "--steps", "0"], "steps is 0"),
        (["-o", "r.safetensors", "--num-prompts", "0"], "num-prompts is 0"),
        (["-o", "r.safetensors", "--budget", "ssim=1"], "is not made of psnr=DB"),
        (["-o", "r.safetensors", "--formats", "int4"], "use int8, fp8"),
        (["-o", "r.safetensors", "--prompts", "missing.txt"], "cannot read prompts"),
    ],
)
def test_bad_arguments_are_refused_with_a_hint(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "nowhere", *arguments]) == USAGE
    error = capsys.readouterr().err
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    place = tmp_path / "folder.safetensors"
    place.mkdir()
    assert main(["calibrate", "nowhere", "-o", str(place)]) == USAGE
    assert f"cannot write {place}: it is a directory" in capsys.readouterr().err
    # The search's files have longer names than the ranges.
    place = tmp_path / f"{'x' * 240}.safetensors"
    assert main(["calibrate", "nowhere", "-o", str(place), "--budget", "psnr=40", "--merge", "r"]) == USAGE
    assert "xxx.sensitivity.json: File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_does_not_exist_is_refused_before_any_work(tiny_checkpoint, tmp_path, capsys, device):
    out = tmp_path / "r.safetensors"
    assert main(["calibrate", str(tiny_checkpoint), "-o", str(out), "--device", device]) == USAGE
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: PyTorch cannot compute on '{device}': "
    )  # no bar, where there is no terminal
    assert "hint: use --device cpu" in error
