"""Fit the linear map from latents to colours that previews use, on pictures of coloured blocks and gradients."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ditc.runtime.bundle.manifest import LatentSpec
from ditc.runtime.session import Array

_CELLS = 16
_PICTURES = 12


def fit_latent_rgb(encoder: nn.Module, latents: LatentSpec) -> Array:
    """The matrix (3, C+1), bias last, that maps a latent cell to the mean colour of its pixels in [-1, 1].

    It is a least-squares fit.

    Args:
        encoder: maps images (B,3,H,W) in [-1,1] to latents (B,C,H/f,W/f) as the denoiser sees them.
    """
    size = _CELLS * latents.scale_factor
    images = torch.from_numpy(_pictures(size))
    with torch.inference_mode():
        z = torch.cat([encoder(image[None]) for image in images]).float()
    colours = torch.nn.functional.avg_pool2d(images, latents.scale_factor)
    x = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).numpy().astype(np.float64)
    y = colours.permute(0, 2, 3, 1).reshape(-1, 3).numpy().astype(np.float64)
    # The latents of coloured blocks span fewer directions than those of real pictures. In the other directions only the
    # ridge bounds the map.
    ridge = 1e-3 * len(x) * np.eye(x.shape[1])
    solution: Array = np.linalg.solve(x.T @ x + ridge, x.T @ y).T
    return solution.astype(np.float32)


def _pictures(size: int) -> Array:
    """(N,3,size,size) fp32 in [-1,1]: random blocks of several sizes, and gradients between random colours."""
    rng = np.random.default_rng(0)
    pictures = []
    for index in range(_PICTURES):
        if index % 3 == 2:
            a, b = rng.uniform(-1, 1, (2, 3, 1, 1))
            ramp = np.linspace(0, 1, size)[None, :, None] * np.ones((1, 1, size))
            pictures.append(a * (1 - ramp) + b * ramp)
        else:
            blocks = 2 ** (1 + index % 3 + 1)
            colours = rng.uniform(-1, 1, (3, blocks, blocks))
            pictures.append(colours.repeat(size // blocks, 1).repeat(size // blocks, 2))
    return np.stack(pictures).astype(np.float32)
