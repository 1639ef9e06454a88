"""The AutoencoderKL decoder and encoder against diffusers' unmodified class."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.export import Dim

from ditc.export.graph.ops import onnx_translations
from ditc.export.networks.autoencoder_kl import AutoencoderKlConfig, load_kl_decoder, load_kl_encoder
from ditc.export.networks.loading import weight_map
from ditc.runtime.errors import CheckpointError
from ditc.runtime.vae import decode_tiled, encode_tiled

# fp32 with the same kernels; only the scale is applied elsewhere. Measured 0 to 9e-7.
FP32_BOUND = 1e-5
BF16_BOUND = 4e-2  # about 30 dependent roundings to 8 bits; measured 1.2e-2, diffusers' own 1.3e-2

TINY: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "sdxl": {"latent_channels": 4, "shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True},
    "no-attention": {"mid_block_add_attention": False},
    "shallow": {"layers_per_block": 1},
}
SIZES = [(2, 4, 6), (1, 9, 5)]  # latents (B,h,w)


@pytest.fixture(scope="module")
def reference(seed_weights):
    """Gives the seeded diffusers module of a config by name. Each is made once."""
    made: dict[str, AutoencoderKL] = {}

    def get(name: str) -> AutoencoderKL:
        if name not in made:
            made[name] = seed_weights(AutoencoderKL(**TINY | CONFIGS[name]))
        return made[name]

    return get


def networks(module: AutoencoderKL, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    config = AutoencoderKlConfig.from_json(module.config)
    tensors = module.state_dict()
    return load_kl_decoder(config, tensors, dtype), load_kl_encoder(config, tensors, dtype)


def latents_of(batch: int, height: int, width: int, channels: int = 16) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def image_of(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_equals_diffusers_decode_of_unscaled_latents(name, size, reference, relative_l2) -> None:
    module = reference(name)
    latents = latents_of(*size, channels=module.config.latent_channels)
    # As in StableDiffusion3Pipeline.__call__.
    unscaled = (latents / module.config.scaling_factor) + (module.config.shift_factor or 0)
    assert relative_l2(networks(module)[0](latents), module.decode(unscaled).sample) <= FP32_BOUND


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_encoder_gives_diffusers_posterior_scaled(name, size, reference, relative_l2) -> None:
    module = reference(name)
    batch, height, width = size
    image = image_of(batch, 4 * height, 4 * width)
    posterior = module.encode(image).latent_dist
    mean, std = networks(module)[1](image)
    expected = (posterior.mode() - (module.config.shift_factor or 0)) * module.config.scaling_factor
    assert relative_l2(mean, expected) <= FP32_BOUND
    assert relative_l2(std, posterior.std * module.config.scaling_factor) <= FP32_BOUND


def test_a_bf16_decoder_stays_close_to_fp32(reference, relative_l2) -> None:
    decoder = networks(reference("sd3"), torch.bfloat16)[0]
    latents = latents_of(2, 4, 6)
    image = decoder(latents)
    assert image.dtype == torch.float32
    assert relative_l2(image, networks(reference("sd3"))[0](latents)) <= BF16_BOUND


def test_tiled_decoding_matches_diffusers(reference, relative_l2) -> None:
    module = reference("sd3")
    decoder = networks(module)[0]
    latents = latents_of(1, 20, 13)

    def decode(tile: np.ndarray) -> np.ndarray:
        return decoder(torch.from_numpy(tile)).numpy()

    # diffusers: tiles of sample_size, overlapping by tile_overlap_factor.
    tiled = decode_tiled(decode, latents.numpy(), tile=32, stride=24, scale=4)
    module.enable_tiling()
    expected = module.decode(latents / 1.5305 + 0.0609).sample
    module.disable_tiling()
    assert relative_l2(torch.from_numpy(tiled), expected) <= FP32_BOUND
    assert relative_l2(decoder(latents), expected) > 0.01, "norms and attention must differ within tiles"


def test_tiled_encoding_matches_diffusers(reference, relative_l2) -> None:
    module = reference("sd3")
    encoder = networks(module)[1]
    image = image_of(1, 80, 52)

    def encode(tile: np.ndarray) -> np.ndarray:
        return encoder(torch.from_numpy(tile))[0].numpy()

    tiled = encode_tiled(encode, image.numpy(), tile=32, stride=24, scale=4)
    module.enable_tiling()
    expected = (module.encode(image).latent_dist.mode() - 0.0609) * 1.5305
    module.disable_tiling()
    assert relative_l2(torch.from_numpy(tiled), expected) <= FP32_BOUND


def test_the_weight_map_rebuilds_every_tensor_bit_for_bit(reference) -> None:
    module = reference("sdxl")
    stages = dict(zip(("vae_decoder", "vae_encoder"), networks(module), strict=True))
    rebuilt = {
        s.checkpoint: stages[s.stage].state_dict()[s.parameter].reshape(s.shape) for s in weight_map(stages)
    }
    assert rebuilt.keys() == module.state_dict().keys()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tiling": True}, "unknown setting tiling = True"),
        ({"act_fn": "relu"}, "act_fn is 'relu'"),
        ({"latents_mean": [0.0] * 16}, "latents_mean is"),
        ({"up_block_types": ("AttnUpDecoderBlock2D",) * 3}, "but only UpDecoderBlock2D is implemented"),
        (
            {"down_block_types": ("DownEncoderBlock2D",)},
            "down_block_types has 1 entries, but block_out_channels has 3",
        ),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(setting, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        AutoencoderKlConfig.from_json(TINY | setting)


# Every run compares a bundle's graphs with PyTorch and diffusers in tests/export/families/sd3/test_pictures.py.
@pytest.mark.slow
@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_the_exported_graph_runs_at_another_shape_and_batch(side, reference, relative_l2) -> None:
    network = networks(reference("shallow"))[side == "encoder"]
    example, other = (
        (latents_of(2, 4, 6), latents_of(3, 7, 5))
        if side == "decoder"
        else (image_of(2, 16, 24), image_of(3, 28, 20))
    )
    cells = {"decoder": 1, "encoder": 4}[side]
    height, width = (
        cells * Dim(name, min=1, max=64) if cells > 1 else Dim(name, min=1, max=64)
        for name in ("height", "width")
    )
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: Dim("batch", min=1, max=8), 2: height, 3: width},),
        custom_translation_table=onnx_translations(20),
        optimize=False,
        verbose=False,
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    out = session.run(None, {session.get_inputs()[0].name: np.asarray(other)})[0]
    assert relative_l2(torch.from_numpy(out), network(other)) <= FP32_BOUND
