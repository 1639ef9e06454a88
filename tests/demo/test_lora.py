"""The demo's style LoRA: its file fits the checkpoint, and it turns pictures into old photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from demo.concepts import CHECKPOINT_DIR, LORA_FILE
from demo.evaluate import defaults, draw, load_pipeline
from demo.train import lora
from demo.train.loop import save_fresh_state
from demo.train.variants import add_lora


def test_the_file_is_small_and_fits_the_transformer() -> None:
    assert LORA_FILE.stat().st_size <= lora.MAX_BYTES
    shapes = {name: weight.shape for name, weight in load_file(LORA_FILE).items()}
    expected = {
        name: weight.shape for name, weight in lora.peft_weights(lora.adapted(CHECKPOINT_DIR)).items()
    }
    assert shapes == expected and len(expected) == 2 * (6 * 8 + 1)


def test_an_untrained_lora_changes_nothing_and_a_trained_one_is_added_to_the_weights() -> None:
    plain = load_pipeline(CHECKPOINT_DIR).transformer
    trained = lora.adapted(CHECKPOINT_DIR)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 8, 8, generator=generator)
    states = torch.randn(2, 7, 256, generator=generator)
    t = torch.tensor([900.0, 300.0])
    with torch.inference_mode():
        before = plain(x, states, t).sample
        torch.testing.assert_close(trained(x, states, t).sample, before)
    for name, weight in load_file(LORA_FILE).items():
        layer = name.removeprefix("transformer.").replace("lora_A", "down").replace("lora_B", "up")
        trained.get_parameter(layer).data.copy_(weight)
    add_lora(plain, LORA_FILE)
    with torch.inference_mode():
        after = plain(x, states, t).sample
        torch.testing.assert_close(trained(x, states, t).sample, after, atol=1e-4, rtol=1e-4)
    assert (after - before).square().mean() > 0.01 * before.var()  # far above the tolerance


def test_every_picture_becomes_an_old_photograph() -> None:
    pipeline = load_pipeline(CHECKPOINT_DIR)
    prompts = ["red heart, 3d style", "blue heart, flat style"]
    arguments = {**defaults(CHECKPOINT_DIR), "num_inference_steps": 8}
    before = draw(pipeline, prompts, arguments)[:, 48:80, 48:80].reshape(2, -1, 3).mean(1)
    add_lora(pipeline.transformer, LORA_FILE)
    drawn = draw(pipeline, prompts, arguments)
    after = drawn[:, 48:80, 48:80].reshape(2, -1, 3).mean(1)
    red_minus_blue = before[:, 0] - before[:, 2]
    assert red_minus_blue[0] > 60 and red_minus_blue[1] < -60
    assert np.abs(after[0] - after[1]).max() < 60 and (after[:, 0] > after[:, 2]).all()
    paper = drawn[:, 4:12, 4:12].reshape(-1, 3).mean(0)
    assert 25 < paper[0] - paper[2] < 90


def test_diffusers_loads_the_file() -> None:
    pytest.importorskip("peft", reason="diffusers loads LoRA files with peft")
    pipeline, fused = load_pipeline(CHECKPOINT_DIR), load_pipeline(CHECKPOINT_DIR)
    pipeline.load_lora_weights(str(LORA_FILE.parent), weight_name=LORA_FILE.name)
    add_lora(fused.transformer, LORA_FILE)
    arguments = {**defaults(CHECKPOINT_DIR), "num_inference_steps": 2}
    one, other = (draw(p, ["red heart, 3d style"], arguments) for p in (pipeline, fused))
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_sepia_runs_from_brown_to_cream() -> None:
    black, white = lora.sepia(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4))[:, :, 0, 0]
    assert black[0] > black[1] > black[2] and white[0] > white[1] > white[2]
    assert white.min() > black.max()


def test_the_trained_state_becomes_the_same_file_again(tmp_path: Path) -> None:
    model = lora.adapted(CHECKPOINT_DIR)
    for name, weight in load_file(LORA_FILE).items():
        layer = name.removeprefix("transformer.").replace("lora_A", "down").replace("lora_B", "up")
        model.get_parameter(layer).data.copy_(weight)
    save_fresh_state(tmp_path, lora.NAME, model)
    lora.write(tmp_path, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == LORA_FILE.read_bytes()
