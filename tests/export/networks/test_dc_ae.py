"""The DC-AE decoder and encoder against diffusers' unmodified AutoencoderDC."""

from __future__ import annotations

from typing import Any

import onnxruntime
import pytest
import torch
from diffusers import AutoencoderDC
from torch.export import Dim

from ditc.export.contract import StageModule
from ditc.export.families.common.specs import vae_specs
from ditc.export.graph.onnx import to_onnx
from ditc.export.graph.ops import add_functions, onnx_translations
from ditc.export.networks.dc_ae import DcAeConfig, load_decoder, load_encoder
from ditc.export.networks.loading import weight_map
from ditc.runtime.bundle.manifest import LatentSpec
from ditc.runtime.errors import CheckpointError
from ditc.runtime.spec import Precision, Range

# fp32 with other orders of products (diffusers uses N x N attention below 33 tokens). Measured 2e-7 to 8e-7.
FP32_BOUND = 1e-5
BF16_BOUND = 4e-2  # about 20 dependent roundings to 8 bits; measured 1e-2

BLOCKS = ("ResBlock", "ResBlock", "EfficientViTBlock")
TINY: dict[str, Any] = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "scaling_factor": 0.41407,
}
TINY |= {f"{side}_block_types": BLOCKS for side in ("encoder", "decoder")}
TINY |= {f"{side}_block_out_channels": (8, 16, 32) for side in ("encoder", "decoder")}
TINY |= {f"{side}_layers_per_block": (1, 1, 2) for side in ("encoder", "decoder")}
TINY |= {f"{side}_qkv_multiscales": ((), (), (5,)) for side in ("encoder", "decoder")}
CONV_FORM = {
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
}  # Sana's f32c32 has this form
NO_FIRST_STAGE = {"encoder_layers_per_block": (0, 1, 1), "decoder_layers_per_block": (0, 1, 1)}
CONFIGS: dict[str, dict[str, Any]] = {
    "pixel-shuffle": {},
    "f32c32": CONV_FORM,
    "batch-norm": {"decoder_norm_types": ("rms_norm", "batch_norm", "batch_norm")},
    # The forms of dc-ae-f32c32-in-1.0: batch norm with ReLU outside, RMSNorm with SiLU inside.
    "in-1.0": {
        **NO_FIRST_STAGE,
        "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
        "decoder_act_fns": ("relu", "relu", "silu"),
    },
    "activations": {"decoder_act_fns": ("relu", "gelu", "silu"), "decoder_conv_act_fn": "silu"},
    "no-shortcuts": {"encoder_out_shortcut": False, "decoder_in_shortcut": False},
    "strided-in-and-out": NO_FIRST_STAGE | CONV_FORM,
    "shuffled-in-and-out": NO_FIRST_STAGE,
    "one-scale": {"encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ())},
    "three-scales": {"decoder_qkv_multiscales": ((), (), (3, 5))},
}
# Latents (B,h,w) of 24 and 6 tokens. diffusers uses N x N attention up to 8 tokens here, which is the head dim.
SIZES = [(2, 4, 6), (1, 3, 2)]


@pytest.fixture(scope="module")
def reference(seed_weights):
    """Gives the seeded diffusers module of a config by name. Each is made once."""
    made: dict[str, AutoencoderDC] = {}

    def get(name: str, **settings: Any) -> AutoencoderDC:
        key = f"{name} {settings}"
        if key not in made:
            made[key] = seed_weights(AutoencoderDC(**TINY | CONFIGS[name] | settings))
        return made[key]

    return get


@pytest.mark.parametrize("size", SIZES, ids=["linear", "quadratic"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_equals_diffusers_decode_of_unscaled_latents(name, size, reference, relative_l2) -> None:
    module, (batch, height, width) = reference(name), size
    decoder = load_decoder(DcAeConfig.from_json(module.config), module.state_dict(), torch.float32)
    latents = torch.randn(batch, 8, height, width, generator=torch.Generator().manual_seed(1))
    expected = module.decode(latents / module.config.scaling_factor).sample
    assert relative_l2(decoder(latents), expected) <= FP32_BOUND


@pytest.mark.parametrize("size", SIZES, ids=["linear", "quadratic"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_encoder_equals_diffusers_encode_and_then_scales(name, size, reference, relative_l2) -> None:
    module, (batch, height, width) = reference(name), size
    config = DcAeConfig.from_json(module.config)
    encoder = load_encoder(config, module.state_dict(), torch.float32)
    side = config.scale_factor
    image = (
        torch.rand(batch, 3, side * height, side * width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    )
    assert relative_l2(encoder(image), module.encode(image).latent * config.scaling_factor) <= FP32_BOUND


@pytest.mark.slow
def test_the_full_width_decoder_with_one_layer_per_stage_equals_diffusers(seed_weights, relative_l2) -> None:
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    module = seed_weights(
        AutoencoderDC(
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            **CONV_FORM,
        )
    )
    decoder = load_decoder(DcAeConfig.from_json(module.config), module.state_dict(), torch.float32)
    latents = torch.randn(1, 32, 6, 7)
    assert relative_l2(decoder(latents), module.decode(latents).sample) <= FP32_BOUND


def test_a_bf16_decoder_stays_close_to_fp32(reference, relative_l2) -> None:
    module = reference("f32c32")
    decoder = load_decoder(DcAeConfig.from_json(module.config), module.state_dict(), torch.bfloat16)
    latents = torch.randn(2, 8, 4, 6)
    image = decoder(latents)
    assert image.dtype == torch.float32
    assert relative_l2(image, module.decode(latents / module.config.scaling_factor).sample) <= BF16_BOUND


def test_the_weight_map_rebuilds_every_tensor_bit_for_bit(reference) -> None:
    module = reference("batch-norm")
    config = DcAeConfig.from_json(module.config)
    stages = {
        "vae_decoder": load_decoder(config, module.state_dict(), torch.float32),
        "vae_encoder": load_encoder(config, module.state_dict(), torch.float32),
    }
    rebuilt = {
        s.checkpoint: stages[s.stage].state_dict()[s.parameter].reshape(s.shape) for s in weight_map(stages)
    }
    read = {name: t for name, t in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert rebuilt.keys() == read.keys()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in read.items())


def test_an_encoder_tensor_that_is_missing_is_refused_when_only_the_decoder_is_read(reference) -> None:
    module = reference("f32c32")
    tensors = dict(module.state_dict())
    del tensors["encoder.conv_out.weight"]
    with pytest.raises(CheckpointError, match=r"lacks encoder\.conv_out\.weight"):
        load_decoder(DcAeConfig.from_json(module.config), tensors, torch.float32)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shift_factor": 0.1}, "unknown setting shift_factor"),
        ({"decoder_norm_types": "layer_norm"}, "decoder_norm_types has 'layer_norm'"),
        ({"decoder_block_types": ("ResBlock",)}, "decoder_block_types has 1 entries"),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(setting, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        DcAeConfig.from_json(TINY | setting)


# One block per stage, because an export costs 0.1 s per node.
SHALLOW = {f"{side}_layers_per_block": (1, 1, 1) for side in ("encoder", "decoder")}
EXPORTS = ["f32c32", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "f32c32")]


@pytest.mark.parametrize("name", EXPORTS)
def test_the_exported_decoder_runs_at_another_size_and_batch(name, reference, relative_l2) -> None:
    module = reference(name, **({} if name.endswith("in-and-out") else SHALLOW))
    decoder = load_decoder(DcAeConfig.from_json(module.config), module.state_dict(), torch.float32)
    dims = {0: Dim("batch", min=1, max=8), 2: Dim("height", min=1, max=64), 3: Dim("width", min=1, max=64)}
    run = _export(decoder, torch.randn(2, 8, 3, 4), dims)
    latents = torch.randn(1, 8, 5, 7)
    assert (
        relative_l2(run(latents), module.decode(latents / module.config.scaling_factor).sample) <= FP32_BOUND
    )


def test_batch_norm_is_exported_with_all_weights_but_the_count_of_training(
    reference, relative_l2, tmp_path
) -> None:
    """The export of a stage records where each weight is, and refuses one that the graph does not use."""
    module = reference("batch-norm", **SHALLOW)
    config = DcAeConfig.from_json(module.config)
    latents = LatentSpec(config.latent_channels, config.scale_factor, 1)
    spec = vae_specs(latents, {"height": Range(1, 3, 8), "width": Range(1, 4, 8)}, max_batch=2)["vae_decoder"]
    decoder = load_decoder(config, module.state_dict(), torch.float32)
    weights = tuple(weight_map({"vae_decoder": decoder}, module.state_dict()))
    stage = StageModule(spec=spec, precision=Precision.FP32, module=decoder, weights=weights)
    files = to_onnx(stage, tmp_path / "decoder.onnx", check=False)
    names = {weight.checkpoint for weight in files.weight_map}
    assert any(name.endswith("running_var") for name in names) and "num_batches" not in "".join(names)
    cells = torch.randn(2, 8, 3, 5)
    image = torch.from_numpy(
        onnxruntime.InferenceSession(files.model).run(None, {"latents": cells.numpy()})[0]
    )
    assert relative_l2(image, module.decode(cells / config.scaling_factor).sample) <= FP32_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_exported_encoder_runs_at_another_size_and_batch(name, reference, relative_l2) -> None:
    module = reference(name, **({} if name.endswith("in-and-out") else SHALLOW))
    encoder = load_encoder(DcAeConfig.from_json(module.config), module.state_dict(), torch.float32)
    cells = {2: Dim("height", min=1, max=64), 3: Dim("width", min=1, max=64)}
    dims = {0: Dim("batch", min=1, max=8)} | {axis: 4 * dim for axis, dim in cells.items()}
    run = _export(encoder, torch.rand(2, 3, 12, 16), dims)
    image = torch.rand(1, 3, 20, 28)
    assert relative_l2(run(image), module.encode(image).latent * module.config.scaling_factor) <= FP32_BOUND


def _export(network, example, dims):
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        dynamic_shapes=(dims,),
        custom_translation_table=onnx_translations(),
        verbose=False,
    )
    add_functions(program.model)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    name = session.get_inputs()[0].name
    return lambda value: torch.from_numpy(session.run(None, {name: value.numpy()})[0])
