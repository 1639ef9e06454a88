"""SANA-Video's networks against diffusers' unmodified SanaVideoTransformer3DModel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import SanaVideoTransformer3DModel
from torch import Tensor, nn
from torch.export import Dim

from ditc.export.families.sana.video_network import SanaVideoConfig, load_sana_video
from ditc.export.graph.ops import add_functions, onnx_translations
from ditc.export.networks.loading import weight_map
from ditc.runtime.errors import CheckpointError

# fp32 with other orders of products, over a few dozen dependent layers.
FP32_BOUND = 1e-5
# Relative L2 of the 16-bit networks to fp32.
BOUNDS_16_BIT = {torch.float16: 3e-3, torch.bfloat16: 2e-2}

TINY = {
    "num_attention_heads": 3,
    "attention_head_dim": 28,  # 10 pairs for frames, 4 for rows, 4 for columns
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 36,
    "cross_attention_dim": 84,
    "caption_channels": 48,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "wan": {},
    "dc-ae": {"in_channels": 32, "out_channels": 32, "patch_size": (1, 1, 1)},
    "ltx2": {"in_channels": 128, "out_channels": 128, "patch_size": (1, 1, 1), "mlp_ratio": 3.0},
    "biases": {
        "attention_bias": True,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-4,
        "qk_norm": None,
        "out_channels": 32,
    },
}
SIZES = [(2, 3, 8, 8, 7), (3, 4, 4, 10, 5)]  # rows, frames, latent height and width, text tokens


@pytest.fixture(scope="module")
def reference(seed_weights):
    """Gives the seeded diffusers module of a config by name. Each is made once."""
    made: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in made:
            made[name] = seed_weights(SanaVideoTransformer3DModel(**TINY | CONFIGS[name]))
        return made[name]

    return get


def inputs(config: Any, rows: int, frames: int, height: int, width: int, length: int) -> dict[str, Tensor]:
    """Inputs whose rows differ in everything, also in their padding. The last row has one token."""
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.linspace(length, 1, rows).long()
    return {
        "hidden_states": torch.randn(rows, config.in_channels, frames, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(rows, length, config.caption_channels, generator=generator),
        "encoder_attention_mask": (torch.arange(length)[None] < lengths[:, None]).long(),
        "timestep": torch.linspace(999.0, 0.5, rows),
    }


def loaded(module: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    return load_sana_video(SanaVideoConfig.from_json(module.config), module.state_dict(), dtype)


def predict(conditioner: nn.Module, denoiser: nn.Module, values: dict[str, Tensor]) -> Tensor:
    dtype = next(denoiser.parameters()).dtype
    conditioning = conditioner(values["encoder_hidden_states"], values["encoder_attention_mask"])
    out: Tensor = denoiser(values["hidden_states"].to(dtype), values["timestep"], *conditioning)
    return out


@pytest.mark.parametrize("size", SIZES, ids=["square", "wide"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_two_networks_together_equal_diffusers_transformer(name, size, reference, relative_l2) -> None:
    module = reference(name)
    values = inputs(module.config, *size)
    assert relative_l2(predict(*loaded(module), values), module(**values).sample) <= FP32_BOUND


@pytest.mark.parametrize("name", ["wan", "dc-ae"])
def test_a_timestep_per_frame_equals_diffusers_image_to_video(name, reference, relative_l2) -> None:
    """SanaImageToVideoPipeline gives every token a timestep, which is 0 in the first frame."""
    module = reference(name)
    values = inputs(module.config, 2, 3, 4, 6, 5)
    t_RF = values["timestep"][:, None] * torch.tensor([0.0, 1.0, 1.0])
    cells = values["hidden_states"].shape[3:]
    tokens = [side // module.config.patch_size[-1] for side in cells]
    per_token = t_RF[:, None, :, None, None].expand(-1, -1, -1, *tokens)
    expected = module(**values | {"timestep": per_token}).sample
    assert relative_l2(predict(*loaded(module), values | {"timestep": t_RF}), expected) <= FP32_BOUND
    assert relative_l2(module(**values).sample, expected) > 1e3 * FP32_BOUND


def test_frames_rows_and_columns_have_positions(reference, relative_l2) -> None:
    """So the tests above would notice a network that confuses them: its convolutions alone are not enough."""
    module = reference("wan")
    values = inputs(module.config, 1, 4, 8, 8, 5)
    before = predict(*loaded(module), values)
    networks = loaded(module)
    for tables in (networks[1].position.cos_of_axes, networks[1].position.sin_of_axes):
        tables[0] = tables[0].flip(0)
    assert relative_l2(predict(*networks, values), before) > 1e2 * FP32_BOUND


@pytest.mark.parametrize("dtype", list(BOUNDS_16_BIT))
def test_16_bit_networks_stay_close_to_fp32(dtype, reference, relative_l2) -> None:
    module = reference("wan")
    values = inputs(module.config, 2, 3, 8, 8, 7)
    out = predict(*loaded(module, dtype), values)
    assert out.dtype == dtype
    assert relative_l2(out, module(**values).sample) <= BOUNDS_16_BIT[dtype]


@pytest.mark.slow
def test_one_layer_at_full_width_equals_diffusers_at_480p(seed_weights, relative_l2) -> None:
    """SANA-Video 2B at 480x832 and 81 frames: latents of 21x60x104 cells, 32,760 tokens."""
    module = seed_weights(SanaVideoTransformer3DModel(num_layers=1, mlp_ratio=3.0))
    values = inputs(module.config, 1, 21, 60, 104, 300)
    assert relative_l2(predict(*loaded(module), values), module(**values).sample) <= FP32_BOUND


def test_the_weight_map_rebuilds_every_tensor_bit_for_bit(reference) -> None:
    module = reference("wan")
    conditioner, denoiser = loaded(module)
    stages = {"conditioner": conditioner, "denoiser": nn.ModuleDict({"network": denoiser})}
    sources = weight_map(stages)
    rebuilt = {s.checkpoint: stages[s.stage].state_dict()[s.parameter].reshape(s.shape) for s in sources}
    assert rebuilt.keys() == module.state_dict().keys()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_rope": True}, "unknown setting use_rope = True"),
        ({"patch_size": (2, 2, 2)}, r"patch_size is \(2, 2, 2\)"),
        ({"attention_head_dim": 27, "cross_attention_dim": 81}, "attention_head_dim is 27"),
        ({"guidance_embeds": True}, "guidance_embeds is true"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"cross_attention_dim": 96}, "cross_attention_dim is 96"),
        ({"out_channels": 24}, "out_channels is 24"),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(setting, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        SanaVideoConfig.from_json(TINY | setting)


@pytest.mark.slow  # test_video_step.py exports one of these in every run
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_exported_graphs_run_at_another_shape_and_batch(
    name, per_frame, seed_weights, relative_l2
) -> None:
    module = seed_weights(SanaVideoTransformer3DModel(**TINY | CONFIGS[name] | {"num_layers": 1}))
    conditioner, denoiser = loaded(module)
    rows, length = Dim("rows", min=1, max=8), Dim("length", min=1, max=300)
    frames = Dim("frames", min=1, max=64)
    patch = denoiser.patch_size
    height, width = (patch * Dim(side, min=1, max=64) for side in ("height", "width"))

    def step(values: dict[str, Tensor], conditioning: list[Tensor]) -> tuple[Tensor, ...]:
        t = values["timestep"]
        if per_frame:
            t = t[:, None] * torch.linspace(0, 1, values["hidden_states"].shape[2])
        return (values["hidden_states"], t, *conditioning)

    values = inputs(module.config, 2, 3, 6, 4, 7)
    text = (values["encoder_hidden_states"], values["encoder_attention_mask"])
    run_conditioner = _export(conditioner, text, ({0: rows, 1: length}, {0: rows, 1: length}))
    shapes = (
        {0: rows, 2: frames, 3: height, 4: width},
        {0: rows, 1: frames} if per_frame else {0: rows},
        {0: rows, 3: length},
        {0: rows, 1: length},
    )
    run_denoiser = _export(denoiser, step(values, conditioner(*text)), shapes)

    other = inputs(module.config, 3, 5, 4, 10, 5)
    conditioning = run_conditioner(other["encoder_hidden_states"], other["encoder_attention_mask"])
    feeds = step(other, conditioning)
    (out,) = run_denoiser(*feeds)
    assert relative_l2(out, denoiser(*feeds)) <= FP32_BOUND
    if not per_frame:
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
