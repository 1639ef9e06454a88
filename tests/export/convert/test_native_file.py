"""Files as training code saves them: the weights are read, plain data beside them is skipped, nothing is run."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.convert.native_file import read_native
from ditc.runtime.errors import CheckpointError

WEIGHTS = {"blocks.0.attn.proj.weight": torch.arange(6.0).reshape(2, 3)}
AVERAGED = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
RANDOM_STATE = {
    "torch": torch.get_rng_state(),
    "torch_cuda": [],
    "numpy": np.random.get_state(),
    "python": random.getstate(),
    "generator": torch.Generator().get_state(),
}


@pytest.mark.parametrize("ema", [False, True])
def test_a_training_file_of_nvlabs_is_read(tmp_path: Path, ema: bool) -> None:
    """The keys of save_checkpoint_ddp, NVlabs/Sana diffusion/utils/checkpoint.py."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    layer.weight.grad = torch.ones(2, 2)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(1 / (step + 1)))
    training = {
        "state_dict": OrderedDict(WEIGHTS),
        "state_dict_ema": AVERAGED,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
        "rng_state": RANDOM_STATE,
    }
    torch.save(training, tmp_path / "epoch_3_step_40.pth")
    _assert_same(read_native(tmp_path / "epoch_3_step_40.pth", ema=ema), AVERAGED if ema else WEIGHTS)


def test_numpys_values_under_the_names_of_numpy_1_are_read_too(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "rng_state": RANDOM_STATE}, tmp_path / "new.pth")
    torch.save(
        {"state_dict": WEIGHTS, "rng_state": RANDOM_STATE},
        tmp_path / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    data = (tmp_path / "old.pth").read_bytes()
    assert b"cnumpy._core.multiarray\n" in data
    (tmp_path / "old.pth").write_bytes(
        data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    )
    for name in ("new.pth", "old.pth"):
        _assert_same(read_native(tmp_path / name), WEIGHTS)


def test_weights_that_are_numpy_arrays_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a.weight": np.ones(3)}}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"net.pth: 'a.weight' is a numpy value, not a tensor"):
        read_native(tmp_path / "net.pth")


def test_fsdps_file_is_read_and_the_error_for_its_folder_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "epoch_3"
    file = folder / "model" / "pytorch_model_fsdp.bin"
    file.parent.mkdir(parents=True)
    torch.save(OrderedDict((f"_orig_mod.{name}", tensor) for name, tensor in WEIGHTS.items()), file)
    torch.save({"rng_state": RANDOM_STATE, "epoch": 3}, folder / "metadata.pth")
    _assert_same(read_native(file), WEIGHTS)
    assert str(file) in _refused(folder)
    assert "'rng_state'" in _refused(folder / "metadata.pth")


def test_the_error_for_sharded_weights_says_how_to_merge_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "pytorch_model_fsdp_0" / "__0_0.distcp").touch()
    assert "merge-weights" in _refused(tmp_path)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"state_dict_ema": AVERAGED, "epoch": 3}, "add --ema"),
        ({"model": WEIGHTS, "ema": AVERAGED, "epoch": 3}, "its tensors are under model, ema"),
        ({"state_dict": OrderedDict((f"module.{name}", t) for name, t in WEIGHTS.items())}, ""),
        ({"n_averaged": torch.ones(()), **{f"module.{name}": t for name, t in WEIGHTS.items()}}, ""),
    ],
    ids=["ema-only", "other-keys", "ddp", "averaged-model"],
)
def test_where_the_weights_are_is_said_or_seen(tmp_path: Path, saved: dict[str, Any], said: str) -> None:
    torch.save(saved, tmp_path / "net.pth")
    if said:
        assert said in _refused(tmp_path / "net.pth")
    else:
        _assert_same(read_native(tmp_path / "net.pth"), WEIGHTS)


def test_averaged_weights_are_not_looked_for_in_a_file_of_one_set(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="--ema has nothing to choose"):
        read_native(tmp_path / "net.safetensors", ema=True)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "net.bin"])
def test_a_git_lfs_pointer_is_recognised(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    refused = _refused(tmp_path / name)
    assert f"{name} is a Git LFS pointer" in refused and "git lfs pull" in refused


@pytest.mark.parametrize("read", [read_native, open_checkpoint])
def test_a_gguf_file_is_named_as_such(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "sana-Q8_0.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(
        CheckpointError, match=r"sana-Q8_0.gguf is a GGUF file, which holds quantized weights"
    ):
        read(tmp_path / "sana-Q8_0.gguf")


def test_a_lora_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"lora_unet_blocks_0_attn.lora_down.weight": torch.ones(2, 2)}, tmp_path / "style.safetensors")
    refused = _refused(tmp_path / "style.safetensors")
    assert "style.safetensors holds a LoRA" in refused and "fuse_lora" in refused


def _refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_native(path)
    assert caught.value.hint
    return f"{caught.value} {caught.value.hint}"


def _assert_same(found: Any, expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
