"""Fit the linear map from latents to colours that previews use, on pictures of coloured blocks and gradients."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from ditc.export.graph.torch_session import one_thread
from ditc.runtime.bundle.manifest import LatentSpec
from ditc.runtime.session import Array

_CELLS = 16
_PICTURES = 12
_TOGETHER = 4  # pictures that are encoded at once; more would take more memory than an export


def fit_latent_rgb(encoder: nn.Module, latents: LatentSpec) -> Array:
    """The matrix (3, C+1), bias last, that maps a latent cell to the mean colour of its pixels in [-1, 1].

    It is a least-squares fit. The encoder runs in fp32 whatever the type of its weights, because PyTorch's convolutions
    in bf16 take more than ten times as long on a CPU without bf16 products.

    Args:
        encoder: maps images (B,3,H,W) in [-1,1] to latents (B,C,H/f,W/f) as the denoiser sees them. A second output is
            not used.
    """
    size = _CELLS * latents.scale_factor
    images = torch.from_numpy(_pictures(size))
    encoder = _in_fp32(encoder)

    def encode(image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            outputs = encoder(image[None])
            latent: torch.Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
            return latent.float()

    workers = min(_TOGETHER, torch.get_num_threads())
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        z = torch.cat(list(pool.map(encode, images)))
    colours = torch.nn.functional.avg_pool2d(images, latents.scale_factor)
    x = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).numpy().astype(np.float64)
    y = colours.permute(0, 2, 3, 1).reshape(-1, 3).numpy().astype(np.float64)
    # The latents of coloured blocks span fewer directions than those of real pictures. In the other directions only the
    # ridge bounds the map.
    ridge = 1e-3 * len(x) * np.eye(x.shape[1])
    # Unlike a matrix product, einsum adds in one order, whatever the number of threads.
    squares, products = np.einsum("ni,nj->ij", x, x), np.einsum("ni,nj->ij", x, y)
    solution: Array = np.linalg.solve(squares + ridge, products).T
    return solution.astype(np.float32)


def _in_fp32(module: nn.Module) -> nn.Module:
    """The module with its weights in fp32. Those that are in fp32 already are shared with it."""
    others: dict[int, object] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            in_fp32 = tensor.detach().float()
            others[id(tensor)] = nn.Parameter(in_fp32, False) if isinstance(tensor, nn.Parameter) else in_fp32
    return copy.deepcopy(module, others)


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
