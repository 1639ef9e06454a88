"""The colours of previews: fitted in fp32, whatever type the encoder is exported in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ditc.export.build.latent_rgb import fit_latent_rgb
from ditc.runtime.bundle.manifest import LatentSpec

LATENTS = LatentSpec(channels=4, scale_factor=4)


class Encoder(nn.Module):
    """Like the exported ones: it computes in the type of its weights and gives fp32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 4, stride=4)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self.conv(image.to(self.conv.weight.dtype)) * self.scale
        return latents.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_computed_with_in_fp32(dtype: torch.dtype) -> None:
    encoder = Encoder().to(dtype)
    rounded = Encoder().to(dtype).float()
    np.testing.assert_array_equal(fit_latent_rgb(encoder, LATENTS), fit_latent_rgb(rounded, LATENTS))
    assert encoder.conv.weight.dtype is dtype  # it still belongs to the export


def test_a_deep_copy_does_not_copy_fp32_weights() -> None:
    encoder = Encoder()
    places = set()
    encoder.conv.register_forward_pre_hook(lambda module, _: places.add(module.weight.data_ptr()))
    fit_latent_rgb(encoder, LATENTS)
    assert places == {encoder.conv.weight.data_ptr()}
