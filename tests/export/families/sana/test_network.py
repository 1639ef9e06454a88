"""Sana's two networks against diffusers' unmodified SanaTransformer2DModel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.export import Dim

from ditc.export.families.sana.network import SanaConfig, load_sana
from ditc.export.graph.ops import add_functions, onnx_translations
from ditc.export.networks.loading import weight_map
from ditc.runtime.errors import CheckpointError

# fp32 with other orders of products, over a few dozen dependent layers. Measured 2e-7 to 6e-7.
FP32_BOUND = 1e-5
# Relative L2 of the 16-bit networks to fp32. diffusers' own networks measure 1e-3 and 8e-3 on these weights.
BOUNDS_16_BIT = {torch.float16: 3e-3, torch.bfloat16: 2e-2}

TINY = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "num_layers": 2,
    "cross_attention_dim": 192,
    "caption_channels": 48,
    "sample_size": 8,
}
QK_NORM = {"qk_norm": "rms_norm_across_heads"}
CROSS_72 = {"num_cross_attention_heads": 3, "cross_attention_head_dim": 72}  # 216 channels, unlike the width
CROSS_112 = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 112}
CONFIGS: dict[str, dict[str, Any]] = {
    "0.6B": CROSS_72,
    "1.6B": CROSS_112,
    "1.5": CROSS_112 | QK_NORM,
    "2K": CROSS_112 | {"interpolation_scale": 1.0},
    "4K": CROSS_112 | {"interpolation_scale": 2.0},
    "patch-2": CROSS_72 | {"patch_size": 2, "interpolation_scale": 2.0},
    "sprint": CROSS_72 | QK_NORM | {"guidance_embeds": True},
    "all-at-once": CROSS_72
    | QK_NORM
    | {"guidance_embeds": True, "interpolation_scale": 1.0, "num_layers": 1},
    "biases": CROSS_72 | {"attention_bias": True, "norm_elementwise_affine": True, "norm_eps": 1e-4},
}


@pytest.fixture(scope="module")
def reference(seed_weights):
    """Gives the seeded diffusers module of a config by name. Each is made once."""
    made: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in made:
            made[name] = seed_weights(SanaTransformer2DModel(**TINY | CONFIGS[name]))
        return made[name]

    return get


def inputs(
    rows: int, height: int, width: int, length: int, config: dict[str, Any], channels: int = 8
) -> dict[str, Tensor]:
    """Inputs whose rows differ in everything, also in their padding. The last row has one token."""
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.linspace(length, 1, rows).long()
    values = {
        "hidden_states": torch.randn(rows, channels, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(rows, length, config["caption_channels"], generator=generator),
        "encoder_attention_mask": (torch.arange(length)[None] < lengths[:, None]).long(),
        "timestep": torch.linspace(999.0, 0.5, rows),
    }
    if config.get("guidance_embeds"):
        values["guidance"] = torch.linspace(0.1, 0.45, rows)
    return values


def guidance_scale(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What the network here takes: diffusers' pipeline, and not its network, multiplies by guidance_embeds_scale."""
    return (values["guidance"] / 0.1,) if "guidance" in values else ()


def predict(conditioner: nn.Module, denoiser: nn.Module, values: dict[str, Tensor]) -> Tensor:
    dtype = next(denoiser.parameters()).dtype
    conditioning = conditioner(values["encoder_hidden_states"], values["encoder_attention_mask"])
    guidance = guidance_scale(values)
    out: Tensor = denoiser(values["hidden_states"].to(dtype), values["timestep"], *guidance, *conditioning)
    return out


@pytest.mark.parametrize("size", [(2, 8, 8, 7), (3, 4, 10, 5)], ids=["square", "wide"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_two_networks_together_equal_diffusers_transformer(name, size, reference, relative_l2) -> None:
    module = reference(name)
    networks = load_sana(SanaConfig.from_json(module.config), module.state_dict(), torch.float32)
    values = inputs(*size, TINY | CONFIGS[name])
    assert relative_l2(predict(*networks, values), module(**values).sample) <= FP32_BOUND


@pytest.mark.parametrize(
    "full",
    [
        {
            "num_attention_heads": 36,
            "cross_attention_dim": 1152,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
        },
        pytest.param(
            QK_NORM | {"num_attention_heads": 70, "cross_attention_dim": 2240}, marks=pytest.mark.slow
        ),
    ],
    ids=["0.6B", "1.5-1.6B"],
)
def test_one_layer_at_full_width_equals_diffusers(full, seed_weights, relative_l2) -> None:
    module = seed_weights(SanaTransformer2DModel(num_layers=1, **full))
    networks = load_sana(SanaConfig.from_json(module.config), module.state_dict(), torch.float32)
    values = inputs(2, 6, 10, 9, {"caption_channels": 2304}, channels=32)
    assert relative_l2(predict(*networks, values), module(**values).sample) <= FP32_BOUND


def test_embeddings_at_padding_positions_do_not_change_the_output(reference, relative_l2) -> None:
    module = reference("1.6B")
    networks = load_sana(SanaConfig.from_json(module.config), module.state_dict(), torch.float32)
    values = inputs(2, 4, 4, 6, TINY)
    before = predict(*networks, values)
    values["encoder_hidden_states"][1, 1:] = 5.0
    assert relative_l2(predict(*networks, values), before) <= FP32_BOUND


@pytest.mark.parametrize("dtype", list(BOUNDS_16_BIT))
@pytest.mark.parametrize("name", ["1.6B", "1.5", "2K"])
def test_16_bit_networks_stay_close_to_fp32(name, dtype, reference, relative_l2) -> None:
    module = reference(name)
    conditioner, denoiser = load_sana(SanaConfig.from_json(module.config), module.state_dict(), dtype)
    values = inputs(2, 8, 8, 7, TINY)
    out = predict(conditioner, denoiser, values)
    assert out.dtype == dtype
    assert relative_l2(out, module(**values).sample) <= BOUNDS_16_BIT[dtype]


def test_an_fp16_projection_beyond_the_range_is_clipped_as_diffusers_clips_it(reference) -> None:
    module = reference("1.6B")
    _, denoiser = load_sana(SanaConfig.from_json(module.config), module.state_dict(), torch.float16)
    attention = denoiser.transformer_blocks[0].attn1
    attention.to_out[0].bias.fill_(float("inf"))
    assert attention(torch.randn(1, 4, 192, dtype=torch.float16)).max() == 65504.0


def test_the_weight_map_rebuilds_every_tensor_bit_for_bit(reference) -> None:
    module = reference("patch-2")
    conditioner, denoiser = load_sana(SanaConfig.from_json(module.config), module.state_dict(), torch.float32)
    stages = {
        "conditioner": conditioner,
        "denoiser": nn.ModuleDict({"network": denoiser}),
    }  # wrapped, as in a step
    sources = weight_map(stages)
    rebuilt = {s.checkpoint: stages[s.stage].state_dict()[s.parameter].reshape(s.shape) for s in sources}
    assert rebuilt.keys() == module.state_dict().keys()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in module.state_dict().items())
    reshaped = {s.checkpoint for s in sources if s.transform == "reshape"}
    assert "patch_embed.proj.weight" in reshaped and "transformer_blocks.1.ff.conv_point.weight" in reshaped


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop("transformer_blocks.1.attn2.to_k.bias"),
            r"lacks transformer_blocks\.1\.attn2\.to_k\.bias",
        ),
        (lambda t: t.update({"lora.down": torch.zeros(1)}), r"unknown tensor lora\.down"),
        (
            lambda t: t.update({"proj_out.weight": torch.zeros(9, 192)}),
            r"proj_out\.weight has shape \(9, 192\)",
        ),
        (
            lambda t: t.update({"proj_out.bias": torch.zeros(8, dtype=torch.int8)}),
            r"proj_out\.bias has the type torch\.int8",
        ),
    ],
    ids=["missing", "extra", "misshapen", "integer"],
)
def test_a_damaged_checkpoint_is_refused_by_the_tensors_name(damage, message, reference) -> None:
    module = reference("1.6B")
    tensors = dict(module.state_dict())
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_sana(SanaConfig.from_json(module.config), tensors, torch.float32)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_rope": True}, "unknown setting use_rope = True"),
        ({"num_layers": "six"}, "num_layers: expected int, got .six., in the Sana config.json"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"cross_attention_dim": 96}, "cross_attention_dim is 96"),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(setting, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        SanaConfig.from_json(TINY | CROSS_72 | setting)


EXPORTS = [name if name == "all-at-once" else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]


@pytest.mark.parametrize("name", EXPORTS)
def test_the_exported_graphs_run_at_another_shape_and_batch(name, reference, relative_l2) -> None:
    module = reference(name)
    conditioner, denoiser = load_sana(SanaConfig.from_json(module.config), module.state_dict(), torch.float32)
    rows, length = Dim("rows", min=1, max=8), Dim("length", min=1, max=300)
    patch = denoiser.patch_size
    height, width = (patch * Dim(name, min=1, max=64) for name in ("height", "width"))
    values = inputs(2, 6, 4, 7, TINY | CONFIGS[name])
    text = (values["encoder_hidden_states"], values["encoder_attention_mask"])
    guidance = guidance_scale(values)
    conditioning_shapes = ({0: rows, 3: length}, {0: rows, 1: length})
    rest = (*({0: rows} for _ in guidance), *conditioning_shapes)  # torch.export sees *rest as one tuple
    shapes = ({0: rows, 2: height, 3: width}, {0: rows}, rest)
    run_conditioner = _export(conditioner, text, ({0: rows, 1: length}, {0: rows, 1: length}))
    step = (values["hidden_states"], values["timestep"], *guidance, *conditioner(*text))
    run_denoiser = _export(denoiser, step, shapes)

    other = inputs(3, 4, 10, 5, TINY | CONFIGS[name])
    conditioning = run_conditioner(other["encoder_hidden_states"], other["encoder_attention_mask"])
    guidance = guidance_scale(other)
    (out,) = run_denoiser(other["hidden_states"], other["timestep"], *guidance, *conditioning)
    assert relative_l2(out, module(**other).sample) <= FP32_BOUND


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
    add_functions(program.model)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]

    def run(*feeds: Tensor) -> list[Tensor]:
        arrays = dict(zip(names, (np.asarray(feed) for feed in feeds), strict=True))
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run
