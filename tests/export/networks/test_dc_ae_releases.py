"""Every released form of DC-AE against diffusers' AutoencoderDC, with all stages and blocks, at 1/16 of the width.

The forms are those of diffusers' scripts/convert_dcae_to_diffusers.py (sana-1.0, in-1.0 and mix-1.0) and of the
models' own registries (mit-han-lab/efficientvit, dc-ai-projects/DC-Gen: sana-1.1, Lite, 1.5). sana-1.1 has the form of
sana-1.0. The 1.5 form can limit its latents to the first channels in training; with all channels, which is how it is
used, its first and last convolutions are plain ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC

from ditc.export.networks.dc_ae import DcAeConfig, load_decoder, load_encoder

# fp32 with other orders of products, as in test_dc_ae.py, through up to 33 blocks. Measured 1e-6 at most.
FP32_BOUND = 1e-5
WIDTHS = (8, 16, 32, 32, 64, 64, 128, 128)
RES, EVIT = "ResBlock", "EfficientViTBlock"


def _form(
    stages: int, latent_channels: int, encoder: dict[str, Any], decoder: dict[str, Any]
) -> dict[str, Any]:
    sides = {"encoder": encoder, "decoder": decoder}
    settings: dict[str, Any] = {"latent_channels": latent_channels, "attention_head_dim": 8}
    for side, own in sides.items():
        settings[f"{side}_block_out_channels"] = WIDTHS[:stages]
        settings |= {f"{side}_{name}": value for name, value in own.items()}
    return settings


def _imagenet(stages: int, latent_channels: int) -> dict[str, Any]:
    """in-1.0 and mix-1.0: convolutions in the three outer stages, attention of one scale inside."""
    inner = stages - 3
    both = {"block_types": (RES,) * 3 + (EVIT,) * inner, "qkv_multiscales": ((),) * stages}
    return _form(
        stages,
        latent_channels,
        both | {"layers_per_block": (0, 4, 8) + (2,) * inner},
        both
        | {
            "layers_per_block": (0, 5, 10) + (2,) * inner,
            "norm_types": ("batch_norm",) * 3 + ("rms_norm",) * inner,
            "act_fns": ("relu",) * 3 + ("silu",) * inner,
        },
    )


SANA = {"block_types": (RES,) * 3 + (EVIT,) * 3, "qkv_multiscales": ((), (), (), (5,), (5,), (5,))}
SANA_ENCODER = SANA | {"layers_per_block": (2, 2, 2, 3, 3, 3)}
PLAIN = {"block_types": (RES,) * 6, "qkv_multiscales": ((),) * 6}
PLAIN_DEEP = PLAIN | {"layers_per_block": (0, 5, 10, 4, 4, 4)}
CONVOLUTIONS = {
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
DEEPER = {"block_types": (RES,) * 7, "qkv_multiscales": ((),) * 7, "layers_per_block": (0, 5, 10, 4, 4, 4, 4)}
NO_SHORTCUTS = {"encoder_out_shortcut": False, "decoder_in_shortcut": False, "decoder_conv_act_fn": "silu"}
RELEASES: dict[str, dict[str, Any]] = {
    "f32c32-sana-1.0": _form(6, 2, SANA_ENCODER, SANA | {"layers_per_block": (3,) * 6}) | CONVOLUTIONS,
    "lite-f32c32-sana-1.1": _form(6, 2, SANA_ENCODER, PLAIN | {"layers_per_block": (0, 3, 5, 4, 4, 4)})
    | {"downsample_block_type": "Conv", "decoder_conv_act_fn": "silu", "scaling_factor": 0.41407},
    "f32c32-in-1.0": _imagenet(6, 2) | {"scaling_factor": 0.3189},
    "f64c128-in-1.0": _imagenet(7, 8) | {"scaling_factor": 0.2889},
    "f128c512-in-1.0": _imagenet(8, 32) | {"scaling_factor": 0.4883},
    "f32c128-1.5": _form(6, 8, PLAIN_DEEP, PLAIN_DEEP) | NO_SHORTCUTS,
    "f64c128-1.5": _form(7, 8, DEEPER, DEEPER) | NO_SHORTCUTS,
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_released_form_equals_diffusers(name, seed_weights, relative_l2) -> None:
    module = seed_weights(AutoencoderDC(**RELEASES[name]))
    config = DcAeConfig.from_json(module.config)
    decoder = load_decoder(config, module.state_dict(), torch.float32)
    encoder = load_encoder(config, module.state_dict(), torch.float32)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.latent_channels, 1, 2, generator=generator)
    expected = module.decode(latents / config.scaling_factor).sample
    assert expected.shape[2:] == (config.scale_factor, 2 * config.scale_factor)
    assert relative_l2(decoder(latents), expected) <= FP32_BOUND
    image = torch.rand(expected.shape, generator=generator) * 2 - 1
    assert relative_l2(encoder(image), module.encode(image).latent * config.scaling_factor) <= FP32_BOUND
