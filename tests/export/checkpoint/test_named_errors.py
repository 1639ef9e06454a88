"""Every error about a checkpoint names the file or folder, says what it is, and has a hint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditc.export.build import graph_artifact
from ditc.export.families.sana.convert import LAYOUT
from ditc.runtime.cli import USAGE, main

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 34361847\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"


@pytest.fixture(params=["tiny_checkpoint", "sd3_checkpoint", "mmdit_checkpoint"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint of each family."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "checkpoint"))


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: object, **__: object) -> None:
        raise AssertionError("an export was begun")

    monkeypatch.setattr(graph_artifact, "to_onnx", export)


@pytest.mark.parametrize(
    ("content", "said"), [(POINTER, "a Git LFS pointer"), (PAGE, "an HTML page")], ids=["lfs", "html"]
)
def test_what_is_in_a_files_place_is_said_whichever_file_it_is(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    for file in [path for path in checkpoint.rglob("*") if path.is_file()]:
        whole = file.read_bytes()
        file.write_bytes(content)
        error, hint = _refused(checkpoint, capsys)
        assert f"{file} is {said}" in error
        assert ("git lfs pull" in hint) == (content == POINTER)
        file.write_bytes(whole)


def test_every_component_is_named_when_its_weights_do_not_fit(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in sorted(checkpoint.rglob("*.safetensors")):
        whole = load_file(file)
        first = next(name for name, tensor in whole.items() if name.endswith("weight") and tensor.dim() > 1)
        for change in (
            {first: torch.ones(3, 5, 7)},
            {first: whole[first] * float("nan")},
            {"extra.weight": torch.ones(1), first: None},
        ):
            changed = {k: t.contiguous() for k, t in {**whole, **change}.items() if t is not None}
            save_file(changed, file, {"format": "pt"})
            error, _ = _refused(checkpoint, capsys)
            assert str(file) in error and all(name in error for name in change), error
        save_file(whole, file, {"format": "pt"})


@pytest.mark.parametrize("setting", [{"new_setting": 3}, {"out_channels": "many"}])
def test_a_networks_config_is_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], setting: dict[str, Any]
) -> None:
    for name in ("transformer", "vae"):
        _edited(checkpoint / name / "config.json", setting, lambda path: _names(path, checkpoint, capsys))


def test_a_text_encoder_of_another_type_is_named_with_its_config(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(checkpoint.glob("text_encoder*/config.json")):
        _edited(
            path,
            {"model_type": "bert", "architectures": None},
            lambda path: _names(path.parent, checkpoint, capsys),
        )


def test_the_schedulers_file_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint / "scheduler" / "scheduler_config.json"
    _edited(path, {"num_train_timesteps": -1}, lambda path: _names(path, checkpoint, capsys))


def test_a_conversion_without_a_base_says_what_is_missing_and_so_does_the_build(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    native, out = tmp_path / "native.safetensors", tmp_path / "out"
    assert main(["convert", "--to-native", str(tiny_checkpoint), str(native)]) == 0
    options = "--resolution 128 --flow-shift 3 --position-embedding none --dtype fp32"
    heads = "--attention-head-dim 16 --cross-attention-head-dim 16"
    line = ["convert", str(native), str(out), *options.split(), *heads.split()]
    assert main(line) == 0
    assert f"{out} has no text_encoder, tokenizer, vae" in caplog.text and "--base" in caplog.text
    capsys.readouterr()
    _, hint = _refused(out, capsys)
    assert "convert again with --base" in hint
    shutil.rmtree(out)
    caplog.clear()
    assert main([*line, "--base", str(tiny_checkpoint)]) == 0
    assert "has no" not in caplog.text
    assert set(LAYOUT.needed) < {path.name for path in out.iterdir()}


def test_a_conversion_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = tmp_path / "net.safetensors"
    for tensors in (
        {"what.weight": torch.ones(1)},
        {"blocks.0.mlp.t_conv.weight": torch.ones(1)},
        {"blocks.0.attn.qkv.weight": torch.ones(1), "blocks.7.x": torch.ones(1)},
        {"joint_blocks.0.x_block.attn.qkv.weight": torch.ones(1)},
    ):
        save_file(tensors, net)
        line = ["--resolution", "64", "--flow-shift", "3"]
        assert main(["convert", str(net), str(tmp_path / "out"), *line]) == USAGE
        assert f"error: {net}" in capsys.readouterr().err


def _names(path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error, _ = _refused(checkpoint, capsys)
    assert str(path) in error, error


def _edited(path: Path, setting: dict[str, Any], check: Callable[[Path], None]) -> None:
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | setting))
    check(path)
    path.write_text(whole)


def _refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """`ditc build` must end with exit code 2 and one error with a hint. Returns both."""
    assert main(["build", str(checkpoint), "-o", str(checkpoint.parent / "bundle")]) == USAGE
    *_, error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: "), (error, hint)
    return error, hint
