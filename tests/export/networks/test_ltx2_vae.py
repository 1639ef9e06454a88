"""The autoencoder of LTX-2 against diffusers' unmodified class."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from torch import Tensor, nn
from torch.export import Dim

from ditc.export.networks.loading import weight_map
from ditc.export.networks.ltx2_vae import Ltx2VaeConfig, TimeConv3d, load_ltx2_decoder, load_ltx2_encoder
from ditc.runtime.errors import CheckpointError

# fp32 with the same kernels. Sums of resampled residuals are taken in another order.
FP32_BOUND = 1e-5
BF16_BOUND = 4e-2  # about 30 dependent roundings to 8 bits

TINY: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["LTX2VideoDownBlock3D"] * 2,
    "decoder_block_out_channels": [16, 32],
    "layers_per_block": [1, 2, 1],
    "decoder_layers_per_block": [1, 2, 1],
    "spatio_temporal_scaling": [True, True],
    "decoder_spatio_temporal_scaling": [True, True],
    "decoder_inject_noise": [False] * 3,
    "downsample_type": ["spatial", "spatiotemporal"],
    "upsample_type": ["spatiotemporal", "spatial"],
    "upsample_residual": [True, True],
    "upsample_factor": [2, 2],
    "patch_size": 2,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "released": {"decoder_causal": False},  # as LTX-2's is, but for its size
    "causal": {"encoder_spatial_padding_mode": "reflect", "decoder_spatial_padding_mode": "zeros"},
    "in time": {
        "decoder_causal": False,
        "encoder_causal": False,
        "downsample_type": ["temporal", "spatiotemporal"],
        "upsample_type": ["spatiotemporal", "temporal"],
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 4,
    },
}


@pytest.fixture(scope="module")
def reference(seed_weights):
    """Gives the seeded diffusers module of a config by name, with statistics that matter. Each is made once."""
    made: dict[str, AutoencoderKLLTX2Video] = {}

    def get(name: str) -> AutoencoderKLLTX2Video:
        if name not in made:
            module = made[name] = seed_weights(AutoencoderKLLTX2Video(**TINY | CONFIGS[name]))
            generator = torch.Generator().manual_seed(3)
            module.latents_mean.copy_(torch.randn(8, generator=generator))
            module.latents_std.copy_(torch.rand(8, generator=generator) + 0.5)
        return made[name]

    return get


def settings(module: AutoencoderKLLTX2Video) -> Ltx2VaeConfig:
    return Ltx2VaeConfig.from_json(module.config)


def latents_of(batch: int, frames: int, height: int, width: int) -> Tensor:
    """Latents as the denoiser sees them."""
    return torch.randn(batch, 8, frames, height, width, generator=torch.Generator().manual_seed(1))


def scale(module: AutoencoderKLLTX2Video) -> tuple[Tensor, Tensor]:
    return module.latents_mean.view(1, -1, 1, 1, 1), module.latents_std.view(1, -1, 1, 1, 1)


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_equals_diffusers(name, frames, reference, relative_l2) -> None:
    module = reference(name)
    config, latents = settings(module), latents_of(2, frames, 2, 5)
    ours = load_ltx2_decoder(config, module.state_dict(), torch.float32)(latents)
    mean, std = scale(module)
    expected = module.decode(latents / (1.0 / std) + mean).sample  # as SanaVideoPipeline.__call__ does it
    per_cell, side = config.frames_per_latent, config.pixels_per_latent
    assert ours.shape == expected.shape == (2, 3, 1 + (frames - 1) * per_cell, 2 * side, 5 * side)
    for index in range(ours.shape[2]):
        assert relative_l2(ours[:, :, index], expected[:, :, index]) <= FP32_BOUND, index


@pytest.mark.parametrize("cells", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_encoding_equals_diffusers(name, cells, reference, relative_l2) -> None:
    """SanaImageToVideoPipeline takes the mode of the posterior, and scales it this way."""
    module = reference(name)
    config = settings(module)
    side, count = config.pixels_per_latent, 1 + (cells - 1) * config.frames_per_latent
    frames = torch.rand(2, 3, count, 2 * side, 3 * side, generator=torch.Generator().manual_seed(2)) * 2 - 1
    (ours,) = load_ltx2_encoder(config, module.state_dict(), torch.float32)(frames)
    mean, std = scale(module)
    expected = (module.encode(frames).latent_dist.mode() - mean) * (1.0 / std)
    assert ours.shape == (2, 8, cells, 2, 3)
    assert relative_l2(ours, expected) <= FP32_BOUND


def test_a_frame_depends_on_later_ones_unless_the_decoder_is_causal(reference, relative_l2) -> None:
    for name, causal in (("released", False), ("causal", True)):
        module = reference(name)
        decoder = load_ltx2_decoder(settings(module), module.state_dict(), torch.float32)
        latents = latents_of(1, 4, 2, 2)
        changed = torch.cat([latents[:, :, :3], latents[:, :, 3:] + 1], dim=2)
        error = relative_l2(decoder(changed)[:, :, 0], decoder(latents)[:, :, 0])
        assert error == 0 if causal else error > 10 * FP32_BOUND


def test_a_bf16_decoder_stays_close_to_fp32(reference, relative_l2) -> None:
    module = reference("released")
    config, latents = settings(module), latents_of(1, 3, 2, 2)
    half, whole = (
        load_ltx2_decoder(config, module.state_dict(), dtype)(latents)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert half.dtype == torch.float32 and relative_l2(half, whole) <= BF16_BOUND


def test_the_weight_map_rebuilds_every_tensor_but_the_statistics_bit_for_bit(reference) -> None:
    module = reference("released")
    config, tensors = settings(module), module.state_dict()
    stages = {
        "vae_decoder": load_ltx2_decoder(config, tensors, torch.float32),
        "vae_encoder": load_ltx2_encoder(config, tensors, torch.float32),
    }
    rebuilt = {
        s.checkpoint: stages[s.stage].state_dict()[s.parameter].reshape(s.shape) for s in weight_map(stages)
    }
    assert rebuilt.keys() | {"latents_mean", "latents_std"} == tensors.keys()
    assert all(torch.equal(rebuilt[name], tensors[name]) for name in rebuilt)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_rope": True}, "unknown setting use_rope = True"),
        ({"timestep_conditioning": True}, "timestep_conditioning is true"),
        ({"decoder_inject_noise": [True, False, False]}, "frames would be random"),
        ({"patch_size_t": 2}, "patch_size_t is 2"),
        ({"downsample_type": ["conv", "spatiotemporal"]}, "it resamples .'conv'"),
        ({"downsample_type": ["spatial", "spatial"]}, "different numbers of frames or pixels"),
        ({"spatial_compression_ratio": None}, "are 2 and None, but the stages give 2 and 8"),
        ({"decoder_block_out_channels": [32, 32]}, "would need shortcuts"),
        ({"upsample_residual": False}, "upsample_residual is false"),
        ({"spatio_temporal_scaling": [True, False]}, "spatio_temporal_scaling is false"),
        ({"layers_per_block": [1, 1]}, "need an entry for each stage, and one for the middle"),
        ({"upsample_factor": [2]}, "need an entry for each stage"),
        ({"decoder_spatial_padding_mode": "circular"}, "padding modes"),
        ({"out_channels": 12}, "in_channels and out_channels are 3 and 12"),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(setting, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        Ltx2VaeConfig.from_json(TINY | setting)


def test_weights_of_another_model_are_refused(reference) -> None:
    module = reference("released")
    config, tensors = settings(module), dict(module.state_dict())
    for change, message in (
        ({"latents_std": torch.ones(4)}, "latents_std has shape"),
        ({"decoder.conv_in.conv.weight": torch.ones(2)}, "decoder.conv_in.conv.weight has shape"),
        ({"decoder.extra": torch.ones(2)}, "unknown tensor decoder.extra"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_ltx2_decoder(config, tensors | change, torch.float32)
    del tensors["latents_mean"]
    with pytest.raises(CheckpointError, match="lacks latents_mean"):
        load_ltx2_decoder(config, tensors, torch.float32)


def test_an_exported_decoder_takes_any_number_of_frames_and_size(reference, relative_l2, tmp_path) -> None:
    module = reference("released")
    decoder = load_ltx2_decoder(settings(module), module.state_dict(), torch.float32)
    sides = {
        0: Dim("batch", max=4),
        2: Dim("frames", max=9),
        3: Dim("height", min=2, max=9),
        4: Dim("width", min=2, max=9),
    }
    program = torch.onnx.export(
        decoder,
        (latents_of(2, 3, 2, 3),),
        dynamo=True,
        dynamic_shapes=(sides,),
        verbose=False,
    )
    path = tmp_path / "decoder.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((1, 2, 2, 3), (1, 5, 4, 2), (1, 1, 3, 3)):
        latents = latents_of(*shape)
        (frames,) = session.run(None, {session.get_inputs()[0].name: latents.numpy()})
        assert relative_l2(torch.from_numpy(np.asarray(frames)), decoder(latents)) <= FP32_BOUND


@pytest.mark.parametrize("causal", [False, True])
def test_sizes_do_not_grow_with_each_convolution_of_an_export(causal: bool) -> None:
    """Mirrored rows made them height + Max(0, ...), nested once per convolution, so an export took many minutes."""
    layers = nn.Sequential(*(TimeConv3d(2, 2, causal=causal, padding="reflect") for _ in range(2)))
    sides = {2: Dim("frames", min=1, max=9), 3: Dim("height", min=1, max=9), 4: Dim("width", min=1, max=9)}
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # as torch.onnx.export has it
        program = torch.export.export(layers, (torch.zeros(1, 2, 3, 4, 5),), dynamic_shapes=(sides,))
    *_, output = program.graph.nodes
    before = next(node for node in program.graph.nodes if node.name == "input_1" or node.name == "input")
    assert output.args[0][0].meta["val"].shape == before.meta["val"].shape
