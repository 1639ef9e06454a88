"""Wan 2.1's autoencoder at full width (127 M weights): the graphs of a bundle stream videos as diffusers does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.families import find_adapter
from ditc.export.graph.onnx import to_onnx
from ditc.export.options import BuildOptions
from ditc.runtime.metrics import relative_l2
from ditc.runtime.session import to_numpy
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import VAE_DECODER, VAE_DECODER_NEXT, VAE_ENCODER
from ditc.runtime.step_contract import KEPT, LATENTS, NEXT_KEPT

# fp32 on both sides; about 40 dependent convolutions, whose sums ONNX Runtime takes in another order.
FP32_BOUND = 1e-5
CELLS, LATENT_FRAMES = (4, 6), 3  # 32x48 pixels, 9 frames


@pytest.fixture(scope="module")
def upstream() -> AutoencoderKLWan:
    """diffusers' class with its defaults, which are Wan 2.1's. Hardly any value of its frames is clamped."""
    torch.manual_seed(0)
    module = AutoencoderKLWan().eval()
    with torch.no_grad():
        module.decoder.conv_out.weight.mul_(0.5)
    return module


@pytest.fixture(scope="module")
def sessions(
    upstream: AutoencoderKLWan, video_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, OnnxRuntimeSession]:
    """The three stages, exported from a checkpoint with this autoencoder."""
    folder = tmp_path_factory.mktemp("full-width")
    path = Path(
        shutil.copytree(video_checkpoint, folder / "checkpoint", ignore=shutil.ignore_patterns("vae"))
    )
    upstream.save_pretrained(path / "vae", safe_serialization=True)
    checkpoint, options = open_checkpoint(path), BuildOptions()
    adapter = find_adapter(checkpoint)
    plan = adapter.plan(checkpoint, options)
    found = {}
    for name in (VAE_DECODER, VAE_DECODER_NEXT, VAE_ENCODER):
        stage = adapter.load(checkpoint, plan, name, options)
        files = to_onnx(stage, folder / f"{name}.onnx", check=False)
        found[name] = OnnxRuntimeSession(files.model, stage.spec, provider=CPU)
    return found


def statistics(module: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, std = module.config.latents_mean, module.config.latents_std
    return torch.tensor(mean)[:, None, None, None], torch.tensor(std)[:, None, None, None]


@pytest.mark.slow  # exports three stages at full width
def test_chunks_through_the_graphs_equal_diffusers(
    upstream: AutoencoderKLWan, sessions: dict[str, OnnxRuntimeSession], record_property: Any
) -> None:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, upstream.config.z_dim, LATENT_FRAMES, *CELLS, generator=generator)
    mean, std = statistics(upstream)
    with torch.no_grad():
        expected = upstream.decode(latents * std + mean).sample.numpy()
    assert (np.abs(expected) >= 1).mean() < 1e-2, "clamped frames would hide differences"
    outputs = sessions[VAE_DECODER].run({LATENTS: latents[:, :, :1].numpy()})
    frames = [to_numpy(outputs["frames"])]
    kept = [outputs[f"{KEPT}{index}"] for index in range(len(outputs) - 1)]
    for index in range(1, LATENT_FRAMES):
        feeds = {f"{KEPT}{i}": value for i, value in enumerate(kept)}
        outputs = sessions[VAE_DECODER_NEXT].run({LATENTS: latents[:, :, index : index + 1].numpy(), **feeds})
        frames.append(to_numpy(outputs["frames"]))
        kept = [outputs[f"{NEXT_KEPT}{i}"] for i in range(len(kept))]
    ours = np.concatenate(frames, axis=2).clip(-1, 1)
    assert ours.shape == expected.shape
    errors = [relative_l2(ours[:, :, index], expected[:, :, index]) for index in range(ours.shape[2])]
    record_property("largest relative L2 of a frame", max(errors))
    assert max(errors) <= FP32_BOUND, errors


@pytest.mark.slow  # exports three stages at full width
def test_the_encoder_equals_diffusers(
    upstream: AutoencoderKLWan, sessions: dict[str, OnnxRuntimeSession], record_property: Any
) -> None:
    sides = tuple(8 * cells for cells in CELLS)
    image = torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean, std = statistics(upstream)
    with torch.no_grad():
        encoded = upstream.encode(image[:, :, None]).latent_dist.mode()
    expected = ((encoded - mean) / std)[:, :, 0].numpy()
    ours = to_numpy(sessions[VAE_ENCODER].run({"image": image.numpy()})[LATENTS])
    error = relative_l2(ours, expected)
    record_property("relative L2", error)
    assert error <= FP32_BOUND
