"""Train the decoder on, with the encoder, and so the latents that the transformer learns, frozen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from demo.concepts import BACKGROUNDS, WHITE, Pair, load_split
from demo.train import art, autoencoder
from demo.train.loop import Job, load_averaged, train
from demo.train.muon import optimizers_for

NAME = "decoder"
_BATCH = 8
_EVALUATED = 64


def run(cache: Path, log: Path, steps: int, lr: float = 2e-3) -> nn.Module:
    """Train, or go on training, the decoder of the trained autoencoder."""
    vae = autoencoder.build_model()
    load_averaged(cache, autoencoder.NAME, vae)
    examples = Examples(vae, cache)
    held_out = autoencoder.Pictures(cache).held_out()[:_EVALUATED]
    with torch.inference_mode():
        held_out_latents = vae.encode(held_out).latent.clone()
    decoder = vae.decoder.train().requires_grad_(True)

    def loss(generator: torch.Generator) -> Tensor:
        z, x = examples.batch(_BATCH, generator)
        noise = torch.randn(z.shape, generator=generator)
        return autoencoder.picture_loss(decoder(z + autoencoder.LATENT_NOISE * noise), x)

    def evaluate(averaged: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            drawn = torch.cat([averaged(z) for z in held_out_latents.split(16)])
        return {"held_out_psnr_db": autoencoder.psnr_db(drawn, held_out)}

    return train(
        Job(
            name=NAME,
            cache=cache,
            log=log,
            model=decoder,
            optimizers=optimizers_for(decoder, lr, 1e-3, plain={"conv_out"}),
            loss=loss,
            evaluate=evaluate,
            steps=steps,
            evaluate_every=200,
            seed=1,
        )
    )


class Examples:
    """Every picture but the held-out ones, on white and on one coloured ground each, with its latents."""

    def __init__(self, vae: nn.Module, cache: Path) -> None:
        self._rgba, pictures = art.load(cache)
        split = load_split()
        held_out, known = set(split.held_out), set(split.trained)
        pairs = [Pair(p.concept, p.style) for p in pictures]
        self._rows = np.array([i for i, p in enumerate(pairs) if p not in held_out])
        is_known = np.array([pairs[i] in known for i in self._rows])
        share = autoencoder.VOCABULARY_SHARE
        weight = np.where(is_known, share / is_known.sum(), (1 - share) / (~is_known).sum())
        self._weight = torch.from_numpy(weight)
        colours = list(BACKGROUNDS.values())
        self._colours = [WHITE, *colours]
        rng = np.random.default_rng(0)
        coloured = rng.integers(1, 1 + len(colours), len(self._rows))
        self._ground = np.stack([np.zeros_like(coloured), coloured])
        with torch.inference_mode():
            self._latents = torch.stack([self._encode(vae, ground) for ground in self._ground]).clone()

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (B, 32, 8, 8) and pictures (B, 3, 128, 128) in [-1, 1]."""
        item = torch.multinomial(self._weight, size, replacement=True, generator=generator)
        coloured = (torch.rand(size, generator=generator) < autoencoder.BACKGROUND_SHARE).long()
        grounds = self._ground[coloured.numpy(), item.numpy()]
        return self._latents[coloured, item], self._pictures(item.numpy(), grounds)

    def _encode(self, vae: nn.Module, grounds: NDArray[np.int64]) -> Tensor:
        parts = np.array_split(np.arange(len(self._rows)), len(self._rows) // 16)
        return torch.cat([vae.encode(self._pictures(part, grounds[part])).latent for part in parts])

    def _pictures(self, items: NDArray[np.int64], grounds: NDArray[np.int64]) -> Tensor:
        rgb = [
            art.on_background(self._rgba[self._rows[i]], self._colours[g])
            for i, g in zip(items, grounds, strict=True)
        ]
        return autoencoder.to_tensor(np.stack(rgb))
