"""The streaming Wan autoencoder against diffusers' unmodified class, which decodes and encodes in chunks too."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.export import Dim

from ditc.export.graph.ops import onnx_translations
from ditc.export.networks.loading import weight_map
from ditc.export.networks.wan_vae import (
    WanVaeConfig,
    WanVaeDecoder,
    WanVaeEncoder,
    kept_frames,
    load_wan_decoder,
    load_wan_encoder,
)
from ditc.runtime.errors import CheckpointError

# fp32 with the same kernels, whose chunks may have other lengths.
FP32_BOUND = 1e-5
BF16_BOUND = 4e-2  # about 30 dependent roundings to 8 bits

TINY: dict[str, Any] = {"base_dim": 4, "num_res_blocks": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "wan": {},
    "two in time": {
        "dim_mult": [1, 2, 2],
        "temperal_downsample": [True, True],
        "scale_factor_spatial": 4,
        "decoder_base_dim": 6,
        "num_res_blocks": 2,
    },
}
# Shallower, so that torch.export takes seconds. diffusers encodes four frames at a time also here.
EXPORTED = {
    "two stages": {
        "dim_mult": [1, 2],
        "temperal_downsample": [True],
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 2,
    }
}
# Latent frames of the chunks after the first one.
CHUNKS = [(1, 1), (2,), (1, 3)]


@pytest.fixture(scope="module")
def reference(seed_weights):
    """Gives the seeded diffusers module of a config by name. Each is made once."""
    made: dict[str, AutoencoderKLWan] = {}

    def get(name: str) -> AutoencoderKLWan:
        if name not in made:
            made[name] = seed_weights(AutoencoderKLWan(**TINY | (CONFIGS | EXPORTED)[name]))
            for parameter in made[name].decoder.conv_out.parameters():
                parameter.mul_(0.05)  # diffusers clamps its frames, and most would be clamped
        return made[name]

    return get


def networks(module: AutoencoderKLWan, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    config = WanVaeConfig.from_json(module.config)
    tensors = module.state_dict()
    return load_wan_decoder(config, tensors, dtype), load_wan_encoder(config, tensors, dtype)


def statistics(module: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, std = module.config.latents_mean, module.config.latents_std
    return torch.tensor(mean)[:, None, None, None], torch.tensor(std)[:, None, None, None]


def latents_of(module: AutoencoderKLWan, batch: int, frames: int, height: int, width: int) -> Tensor:
    """Latents as the denoiser sees them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, module.config.z_dim, frames, height, width, generator=generator)


def decoded_by_diffusers(module: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """As SanaVideoPipeline.__call__ does it."""
    mean, std = statistics(module)
    frames = module.decode(latents / (1.0 / std) + mean).sample
    assert (frames.abs() >= 1).float().mean() < 1e-2, "clamped frames would hide differences"
    return frames


def in_chunks(run: Any, x: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Run a network or a graph over one frame, then over chunks of the lengths, and join what it returns."""
    done, kept = [], []
    for chunk in x.split((1, *lengths), dim=2):
        out, *kept = run(chunk, *kept)
        done.append(out)
    return torch.cat(done, dim=2), kept


@pytest.mark.parametrize("lengths", CHUNKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_in_chunks_equals_diffusers(name, lengths, reference, relative_l2) -> None:
    module = reference(name)
    latents = latents_of(module, 2, 1 + sum(lengths), 4, 6)
    frames, _ = in_chunks(networks(module)[0], latents, lengths)
    assert frames.shape[2] == 1 + 4 * sum(lengths)
    expected = decoded_by_diffusers(module, latents)
    for index in range(
        frames.shape[2]
    ):  # so a small error in the first frame counts as much as in later ones
        assert relative_l2(frames[:, :, index].clamp(-1, 1), expected[:, :, index]) <= FP32_BOUND, index


@pytest.mark.parametrize("lengths", CHUNKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_encoding_in_chunks_equals_diffusers(name, lengths, reference, relative_l2) -> None:
    """SanaImageToVideoPipeline takes the mode of the posterior, and scales it this way."""
    module = reference(name)
    side = WanVaeConfig.from_json(module.config).pixels_per_latent
    frames = torch.rand(2, 3, 1 + 4 * sum(lengths), 2 * side, 3 * side) * 2 - 1
    latents, _ = in_chunks(networks(module)[1], frames, tuple(4 * length for length in lengths))
    mean, std = statistics(module)
    expected = (module.encode(frames).latent_dist.mode() - mean) * (1.0 / std)
    for index in range(latents.shape[2]):
        assert relative_l2(latents[:, :, index], expected[:, :, index]) <= FP32_BOUND, index


def test_every_kept_frame_matters_to_the_next_chunk(reference, relative_l2) -> None:
    """So the tests above would notice a convolution that loses what it keeps."""
    module = reference("wan")
    decoder, latents = networks(module)[0], latents_of(module, 1, 3, 4, 4)
    _, *kept = decoder(latents[:, :, :1])
    _, *kept = decoder(latents[:, :, 1:2], *kept)
    right, *_ = decoder(latents[:, :, 2:], *kept)
    for index, frames in enumerate(kept):
        other = [*kept[:index], torch.zeros_like(frames), *kept[index + 1 :]]
        assert relative_l2(decoder(latents[:, :, 2:], *other)[0], right) > 1e2 * FP32_BOUND, index


def test_what_is_kept_has_the_stated_shapes_at_every_chunk(reference) -> None:
    module = reference("wan")
    config = WanVaeConfig.from_json(module.config)
    decoder, encoder = networks(module)
    height, width = 4, 6
    latents, frames = latents_of(module, 2, 4, height, width), torch.zeros(2, 3, 13, 8 * height, 8 * width)
    for network, kind, x, lengths in (
        (decoder, WanVaeDecoder, latents, (1, 2)),
        (encoder, WanVaeEncoder, frames, (4, 8)),
    ):
        stated = [
            (2, kept.channels, kept.frames, height * kept.scale, width * kept.scale)
            for kept in kept_frames(config, kind)
        ]
        for count in range(len(lengths) + 1):
            _, kept = in_chunks(network, x[:, :, : 1 + sum(lengths[:count])], lengths[:count])
            assert [tuple(tensor.shape) for tensor in kept] == stated


def test_a_bf16_decoder_stays_close_to_fp32(reference, relative_l2) -> None:
    module = reference("wan")
    latents = latents_of(module, 1, 3, 4, 4)
    frames, kept = in_chunks(networks(module, torch.bfloat16)[0], latents, (1, 1))
    assert frames.dtype == torch.float32 and {x.dtype for x in kept} == {torch.bfloat16}
    assert relative_l2(frames, in_chunks(networks(module)[0], latents, (1, 1))[0]) <= BF16_BOUND


def test_the_weight_map_rebuilds_every_tensor_bit_for_bit(reference) -> None:
    module = reference("wan")
    stages = dict(zip(("vae_decoder", "vae_encoder"), networks(module), strict=True))
    rebuilt = {
        s.checkpoint: stages[s.stage].state_dict()[s.parameter].reshape(s.shape) for s in weight_map(stages)
    }
    assert rebuilt.keys() == module.state_dict().keys()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_rope": True}, "unknown setting use_rope = True"),
        ({"is_residual": True}, "is_residual is True"),
        ({"patch_size": 2}, "patch_size is 2"),
        ({"attn_scales": [0.5]}, r"attn_scales is \(0\.5,\)"),
        ({"z_dim": 48}, "16 and 16 entries, but z_dim is 48"),
        ({"temperal_downsample": [True]}, "temperal_downsample has 1 entries"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal and scale_factor_spatial are 8 and 8"),
        ({"out_channels": 12}, "in_channels and out_channels are 3 and 12"),
        ({"latents_std": [0.0] * 16}, "latents_std has a 0"),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(setting, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        WanVaeConfig.from_json(TINY | setting)


@pytest.mark.parametrize("name", ["two stages", pytest.param("wan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", ["decoder", "encoder"])
def test_two_exported_graphs_stream_a_video_of_another_size(which, name, reference, relative_l2) -> None:
    module = reference(name)
    config = WanVaeConfig.from_json(module.config)
    network = networks(module)[which == "encoder"]
    batch, height, width = (
        Dim("batch", min=1, max=4),
        Dim("height", min=1, max=64),
        Dim("width", min=1, max=64),
    )
    count = Dim("count", min=1, max=32)
    if which == "decoder":
        x, other, unit, lengths = latents_of(module, 2, 3, 4, 6), latents_of(module, 1, 5, 6, 4), 1, (1, 3)
        expected, cells = decoded_by_diffusers(module, other), 1
    else:
        unit, cells, lengths = config.frames_per_latent, config.pixels_per_latent, (4, 12)
        x, other = torch.rand(2, 3, 9, 4 * cells, 6 * cells), torch.rand(1, 3, 17, 6 * cells, 4 * cells)
        mean, std = statistics(module)
        expected = (module.encode(other).latent_dist.mode() - mean) * (1.0 / std)
    first = {0: batch, 3: cells * height, 4: cells * width}
    run_first = _export(network, (x[:, :, :1],), (first,))
    _, *kept = network(x[:, :, :1])
    kind = WanVaeDecoder if which == "decoder" else WanVaeEncoder
    scales = [k.scale for k in kept_frames(config, kind)]
    shapes = tuple({0: batch, 3: scale * height, 4: scale * width} for scale in scales)
    run_next = _export(network, (x[:, :, 1:], *kept), (first | {2: unit * count}, shapes))

    def run(chunk: Tensor, *kept: Tensor) -> list[Tensor]:
        return run_next(chunk, *kept) if kept else run_first(chunk)

    done, _ = in_chunks(run, other, lengths)
    assert relative_l2(done, expected) <= FP32_BOUND


def _export(network: nn.Module, arguments: tuple[Tensor, ...], shapes: tuple[Any, ...]):
    program = torch.onnx.export(
        network,
        arguments,
        dynamo=True,
        dynamic_shapes=shapes,
        custom_translation_table=onnx_translations(),
        verbose=False,
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]

    def run(*feeds: Tensor) -> list[Tensor]:
        arrays = dict(zip(names, (np.asarray(feed) for feed in feeds), strict=True))
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run
