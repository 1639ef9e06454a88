"""Fixtures that the tests of the networks share: seeded weights that exercise every path, and a metric."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


def _seed_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights as large as a trained network's: matrices keep the scale of their input, and vectors (biases, norms)
    are large enough to change the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel()
            scale = fan_in**-0.5 if parameter.dim() > 1 else 0.3
            is_gain = parameter.dim() == 1 and "norm" in name and name.endswith("weight")
            offset = 1.0 if is_gain else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if "running_" in name:
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def _relative_l2(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@pytest.fixture(scope="session")
def seed_weights() -> Callable[..., nn.Module]:
    return _seed_weights


@pytest.fixture(scope="session")
def relative_l2() -> Callable[[Tensor, Tensor], float]:
    return _relative_l2


@pytest.fixture(autouse=True)
def _without_gradients() -> object:
    with torch.no_grad():
        yield
