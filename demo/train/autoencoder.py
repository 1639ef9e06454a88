"""Train the AutoencoderDC, which maps 128 px pictures to 8x8x32 latents and back.

The loss sums the errors of pixels (L1 and squared), edges, and flat colours. A penalty keeps every latent channel near
mean 0 and standard deviation 1, because SanaPipeline has one scaling factor for all channels. Noise on the latents
makes the decoder tolerate the error that a denoiser leaves, above all a quantized one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor, nn

from demo.concepts import BACKGROUNDS, WHITE, Pair, load_split
from demo.train import art
from demo.train.loop import Job, train
from demo.train.muon import optimizers_for

NAME = "autoencoder"
_BATCH = 8
_LATENT_NOISE = 0.1
_VOCABULARY_SHARE = (
    0.6  # of each batch; the other pictures show ~800 more concepts, so that the model stays general
)
_BACKGROUND_SHARE = 0.35
_EVALUATED = 64


def build_model() -> AutoencoderDC:
    """An f16c32 model with one EfficientViT stage on each side. The first stage is only a strided convolution."""
    blocks = ("ResBlock",) * 4 + ("EfficientViTBlock",)
    scales: tuple[tuple[int, ...], ...] = ((),) * 4 + ((5,),)
    channels = (32, 32, 64, 128, 128)
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=32,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 2, 2, 2),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=1.0,
    )


def run(cache: Path, log: Path, steps: int, lr: float = 3e-3) -> nn.Module:
    """Train the autoencoder, or resume its training."""
    torch.manual_seed(0)
    model = build_model().train()
    pictures = Pictures(cache)

    def loss(generator: torch.Generator) -> Tensor:
        return reconstruction_loss(model, pictures.batch(_BATCH, generator), generator)

    held_out = pictures.held_out()[:_EVALUATED]
    optimizers = optimizers_for(model, lr, 1e-3, plain={"encoder.conv_in", "decoder.conv_out"})
    return train(
        Job(
            name=NAME,
            cache=cache,
            log=log,
            model=model,
            optimizers=optimizers,
            loss=loss,
            evaluate=lambda m: {"held_out_psnr_db": psnr_db(reconstruct(m, held_out), held_out)},
            steps=steps,
            evaluate_every=200,
        )
    )


def reconstruction_loss(model: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """The training loss of pictures (B, 3, H, W) in [-1, 1]."""
    z = model.encode(x).latent
    y = model.decode(z + _LATENT_NOISE * torch.randn(z.shape, generator=generator)).sample
    return picture_loss(y, x) + latent_penalty(z)


def picture_loss(y: Tensor, x: Tensor) -> Tensor:
    """The weighted sum of the errors of pixels, edges and flat colours."""
    error = y - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    colours = F.avg_pool2d(error, 4).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 0.5 * colours


def latent_penalty(z: Tensor) -> Tensor:
    """Distance of every channel from mean 0 and standard deviation 1 over the batch."""
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    return 0.02 * (mean.square().mean() + (std - 1).square().mean())


class Pictures:
    """The art as batches of RGB pictures in [-1, 1]. Held-out pictures are never in a training batch."""

    def __init__(self, cache: Path) -> None:
        self._rgba, pictures = art.load(cache)
        split = load_split()
        held_out = set(split.held_out)
        known = set(split.trained)
        pairs = [Pair(p.concept, p.style) for p in pictures]
        self._held_out = [i for i, p in enumerate(pairs) if p in held_out]
        self._known = np.array([i for i, p in enumerate(pairs) if p in known])
        self._other = np.array([i for i, p in enumerate(pairs) if p not in known and p not in held_out])

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Random training pictures, some on coloured grounds, half of them mirrored."""
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        from_known = rng.random(size) < _VOCABULARY_SHARE
        index = np.where(from_known, rng.choice(self._known, size), rng.choice(self._other, size))
        colours = list(BACKGROUNDS.values())
        drawn = []
        for i in index:
            colour = colours[rng.integers(len(colours))] if rng.random() < _BACKGROUND_SHARE else WHITE
            rgb = art.on_background(self._rgba[i], colour)
            drawn.append(rgb[:, ::-1] if rng.random() < 0.5 else rgb)
        return to_tensor(np.stack(drawn))

    def held_out(self) -> Tensor:
        """All held-out pictures on white."""
        return to_tensor(art.on_background(self._rgba[self._held_out], WHITE))


def to_tensor(rgb: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """Convert bytes (B, H, W, 3) to floats (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(rgb).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def reconstruct(model: nn.Module, x: Tensor) -> Tensor:
    """Encode and decode, sixteen pictures at a time."""
    with torch.inference_mode():
        return torch.cat([model.decode(model.encode(part).latent).sample for part in x.split(16)])


def psnr_db(y: Tensor, x: Tensor) -> float:
    """The mean over the pictures of the peak signal-to-noise ratio in dB, for values in [-1, 1]."""
    mse = ((y.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3))
    return float((-10 * mse.log10()).mean())
