"""The noise levels of a variance-preserving training schedule, which diffusers' flow solvers still take some ends from.

The levels are computed in torch, as diffusers 0.42.1 does, because the sums of float32 logarithms must round alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditc.runtime.errors import CheckpointError


def training_sigmas(config: Mapping[str, Any]) -> tuple[float, float]:
    """The smallest and the largest level sqrt((1 - p) / p), where p is the product of all 1 - beta up to it.

    Raises:
        CheckpointError: the config's betas are not such a schedule.
    """
    betas = _betas(config)
    if config.get("rescale_betas_zero_snr"):
        betas = _without_signal_at_end(betas)
    products = torch.cumprod(1.0 - betas, dim=0)
    if config.get("rescale_betas_zero_snr"):
        products[-1] = 2**-24  # the last level would be infinite
    levels = ((1 - products) / products) ** 0.5
    if not torch.isfinite(levels).all():
        raise CheckpointError(
            "the betas in scheduler_config.json give noise levels that are not finite",
            hint="scheduler/scheduler_config.json is damaged or was edited: fetch it again",
        )
    return float(levels[0]), float(levels[-1])


def _betas(config: Mapping[str, Any]) -> Tensor:
    number = int(config.get("num_train_timesteps", 1000))
    trained, schedule = config.get("trained_betas"), config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    try:
        if trained is not None:
            return torch.tensor(trained, dtype=torch.float32)
        if schedule == "linear":
            return torch.linspace(start, end, number, dtype=torch.float32)
        if schedule == "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, number, dtype=torch.float32) ** 2
        if schedule == "squaredcos_cap_v2":
            return _cosine_betas(number)
    except (TypeError, ValueError, RuntimeError) as e:
        raise CheckpointError(
            f"the betas in scheduler_config.json are not numbers: {e}",
            hint="scheduler/scheduler_config.json is damaged or was edited: fetch it again",
        ) from e
    raise CheckpointError(
        f"beta_schedule is {schedule!r}, but ditc and diffusers know linear, scaled_linear and squaredcos_cap_v2",
        hint="scheduler/scheduler_config.json is damaged or was edited: fetch it again",
    )


def _cosine_betas(number: int) -> Tensor:
    """Betas whose products follow a squared cosine, none above 0.999 (arXiv 2102.09672, section 3.2)."""

    def product(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    times = [(index / number, (index + 1) / number) for index in range(number)]
    return torch.tensor(
        [min(1 - product(later) / product(earlier), 0.999) for earlier, later in times], dtype=torch.float32
    )


def _without_signal_at_end(betas: Tensor) -> Tensor:
    """The betas moved so that no signal is left at the last level (arXiv 2305.08891, algorithm 1)."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    squares = ((roots - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([squares[:1], squares[1:] / squares[:-1]])
