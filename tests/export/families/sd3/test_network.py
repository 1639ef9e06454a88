"""SD3's network against diffusers' unmodified SD3Transformer2DModel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.export import Dim

from ditc.export.families.sd3.network import Sd3Config, load_sd3
from ditc.export.graph.ops import onnx_translations
from ditc.export.networks.loading import weight_map
from ditc.runtime.errors import CheckpointError, UsageError

# fp32 with other kernels and orders of products, over a few dozen dependent layers. Measured 0 to 5e-7.
FP32_BOUND = 1e-5
# Relative L2 of the 16-bit networks to fp32. diffusers' own networks measure 1e-3 and 1e-2 on these weights.
BOUNDS_16_BIT = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

TINY: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 12,
}
QK_NORM = {"qk_norm": "rms_norm"}
CONFIGS: dict[str, dict[str, Any]] = {
    "3-medium": {},
    "3.5-large": QK_NORM,
    "3.5-medium": QK_NORM | {"dual_attention_layers": (0, 1)},
    "dual-to-the-end": {"dual_attention_layers": (0, 1, 2), "num_layers": 3},
    "odd-rest": {"pos_embed_max_size": 11},
    "one-block": QK_NORM | {"num_layers": 1},
    # One block of each kind, for the exporter.
    "two-blocks": QK_NORM | {"num_layers": 2, "dual_attention_layers": (0,)},
}
# Rows, latent height, latent width, text tokens. The second fills the position embedding of "odd-rest".
SIZES = [(2, 8, 8, 7), (3, 22, 6, 5)]


@pytest.fixture(scope="module")
def reference(seed_weights):
    """Gives the seeded diffusers module of a config by name. Each is made once."""
    made: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in made:
            made[name] = seed_weights(SD3Transformer2DModel(**TINY | CONFIGS[name]))
        return made[name]

    return get


def inputs(
    rows: int, height: int, width: int, length: int, config: dict[str, Any] = TINY
) -> tuple[Tensor, ...]:
    """latents, timestep, text_embeds and pooled_projections, whose rows differ in everything."""
    generator = torch.Generator().manual_seed(rows)
    return (
        torch.randn(rows, 16, height, width, generator=generator),
        torch.linspace(999.0, 0.5, rows),
        torch.randn(rows, length, config["joint_attention_dim"], generator=generator),
        torch.randn(rows, config["pooled_projection_dim"], generator=generator),
    )


def upstream(module: nn.Module, values: tuple[Tensor, ...], **options: Any) -> Tensor:
    latents, timestep, text_embeds, pooled = values
    out: Tensor = module(
        hidden_states=latents,
        encoder_hidden_states=text_embeds,
        pooled_projections=pooled,
        timestep=timestep,
        **options,
    ).sample
    return out


def load(module: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return load_sd3(Sd3Config.from_json(module.config), module.state_dict(), dtype, **options)


@pytest.mark.parametrize("size", SIZES, ids=["square", "tall"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_network_equals_diffusers_transformer(name, size, reference, relative_l2) -> None:
    module = reference(name)
    values = inputs(*size)
    assert relative_l2(load(module)(*values), upstream(module, values)) <= FP32_BOUND


def test_one_block_at_full_width_equals_diffusers(seed_weights, relative_l2) -> None:
    full = QK_NORM | {"num_layers": 1, "dual_attention_layers": (0,), "pos_embed_max_size": 24}
    module = seed_weights(SD3Transformer2DModel(num_attention_heads=24, caption_projection_dim=1536, **full))
    values = inputs(2, 12, 8, 9, {"joint_attention_dim": 4096, "pooled_projection_dim": 2048})
    assert relative_l2(load(module)(*values), upstream(module, values)) <= FP32_BOUND


@pytest.mark.parametrize("name", ["3.5-medium", "3-medium"])
def test_rows_with_a_gate_skip_the_blocks_and_the_others_do_not(name, reference, relative_l2) -> None:
    module, skipped = reference(name), (0, 2)
    network = load(module, skip_layers=skipped)
    values = inputs(3, 8, 10, 5)
    out = network(*values, torch.tensor([0.0, 1.0, 0.0]))
    plain, skip = upstream(module, values), upstream(module, values, skip_layers=list(skipped))
    assert relative_l2(out[[0, 2]], plain[[0, 2]]) <= FP32_BOUND
    assert relative_l2(out[1], skip[1]) <= FP32_BOUND
    assert relative_l2(skip[1], plain[1]) > 0.1, "the skipped blocks must matter"


def test_a_nan_in_a_skipped_block_does_not_reach_the_row_that_skips_it(reference) -> None:
    network = load(reference("3-medium"), skip_layers=(1,))
    network.transformer_blocks[1].ff.net[2].bias = nn.Parameter(torch.full((64,), torch.nan))
    out = network(*inputs(2, 8, 8, 5), torch.tensor([1.0, 0.0]))
    assert out[0].isfinite().all() and not out[1].isfinite().all()


@pytest.mark.parametrize("dtype", list(BOUNDS_16_BIT))
@pytest.mark.parametrize("name", ["3-medium", "3.5-large", "3.5-medium"])
def test_16_bit_networks_stay_close_to_fp32(name, dtype, reference, relative_l2) -> None:
    module = reference(name)
    latents, *rest = inputs(2, 8, 8, 7)
    out = load(module, dtype)(latents.to(dtype), *rest)
    assert out.dtype == dtype
    assert relative_l2(out, upstream(module, (latents, *rest))) <= BOUNDS_16_BIT[dtype]


def test_the_timestep_is_not_rounded_in_a_16_bit_network(reference, relative_l2) -> None:
    network = load(reference("3-medium"), torch.bfloat16)
    latents, _, *rest = inputs(1, 8, 8, 7)
    # bf16 rounds both to the same value.
    near, far = (network(latents.bfloat16(), torch.tensor([t]), *rest) for t in (997.0, 999.5))
    assert relative_l2(near, far) > 0.01


def test_fp32_blocks_stay_fp32_in_an_fp16_network_only(reference, monkeypatch, relative_l2) -> None:
    module = reference("3.5-large")
    monkeypatch.setitem(Sd3Config.fp32_blocks.fget.__globals__["FP32_BLOCKS"], (3, 4), (1,))
    latents, *rest = inputs(2, 8, 8, 7)
    network = load(module, torch.float16)
    types = [{p.dtype for p in block.parameters()} for block in network.transformer_blocks]
    assert types == [{torch.float16}, {torch.float32}, {torch.float16}]
    out = network(latents.half(), *rest)
    assert out.dtype == torch.float16
    assert relative_l2(out, upstream(module, (latents, *rest))) <= BOUNDS_16_BIT[torch.float16]
    assert {p.dtype for p in load(module, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_an_fp32_block_computes_values_beyond_fp16s_range(reference, monkeypatch) -> None:
    module = reference("3.5-large")
    latents, *rest = inputs(1, 8, 8, 7)
    damaged = {**module.state_dict()}
    name = "transformer_blocks.1.ff.net.0.proj.bias"  # 1e5 is Inf in fp16; the block's second Linear brings it back
    damaged[name] = torch.full_like(damaged[name], 1e5)
    damaged["transformer_blocks.1.ff.net.2.weight"] = damaged["transformer_blocks.1.ff.net.2.weight"] * 1e-5
    config = Sd3Config.from_json(module.config)
    for wide, finite in (((), False), ((1,), True)):
        monkeypatch.setitem(Sd3Config.fp32_blocks.fget.__globals__["FP32_BLOCKS"], (3, 4), wide)
        network = load_sd3(config, damaged, torch.float16)
        assert bool(network(latents.half(), *rest).isfinite().all()) is finite


def test_block_35_of_the_large_network_is_an_fp32_block() -> None:
    large = Sd3Config(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
    assert large.fp32_blocks == (35,)
    assert Sd3Config(num_layers=24, num_attention_heads=24).fp32_blocks == ()


def test_the_weight_map_rebuilds_every_tensor_bit_for_bit(reference) -> None:
    module = reference("3.5-medium")
    stages = {"denoiser": nn.ModuleDict({"network": load(module)})}  # wrapped, as in a step
    sources = weight_map(stages)
    rebuilt = {s.checkpoint: stages[s.stage].state_dict()[s.parameter].reshape(s.shape) for s in sources}
    assert rebuilt.keys() == module.state_dict().keys()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in module.state_dict().items())
    assert {s.checkpoint for s in sources if s.transform == "reshape"} == {"pos_embed.proj.weight"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop("transformer_blocks.1.attn2.to_k.bias"),
            r"lacks transformer_blocks\.1\.attn2\.to_k\.bias",
        ),
        (lambda t: t.update({"lora.down": torch.zeros(1)}), r"unknown tensor lora\.down"),
        (
            lambda t: t.update({"pos_embed.pos_embed": torch.zeros(1, 64, 64)}),
            r"pos_embed\.pos_embed has shape \(1, 64, 64\), but its config asks for \(1, 144, 64\)",
        ),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_a_damaged_checkpoint_is_refused_by_the_tensors_name(damage, message, reference) -> None:
    module = reference("3.5-medium")
    tensors = dict(module.state_dict())
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_sd3(Sd3Config.from_json(module.config), tensors, torch.float32)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_rope": True}, "unknown setting use_rope = True"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"caption_projection_dim": 96}, "caption_projection_dim is 96"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size: expected int"),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(setting, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        Sd3Config.from_json(TINY | setting)


def test_a_picture_larger_than_the_position_embedding_is_refused() -> None:
    config = Sd3Config.from_json(TINY)
    config.check_size(24, 24)
    with pytest.raises(
        UsageError, match="latent width 26 is larger than the position embedding, which covers 24"
    ):
        config.check_size(24, 26)
    with pytest.raises(UsageError, match="latent height 9 is not a multiple of the patch size 2"):
        config.check_size(9, 24)


def test_skip_layers_that_are_not_blocks_are_refused(reference) -> None:
    with pytest.raises(UsageError, match=r"skip layers \[7, 8\] are not blocks of this network, which has 3"):
        load(reference("3-medium"), skip_layers=(1, 7, 8))


# Every run compares a bundle's graph with diffusers in tests/export/families/sd3/test_pictures.py.
@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_exported_graph_runs_at_another_shape_and_batch(name, opset, reference, relative_l2) -> None:
    module = reference(name)
    network, skipped = load(module, skip_layers=(0,)), [0]
    rows, length = Dim("rows", min=1, max=8), Dim("length", min=1, max=400)
    largest = module.config.pos_embed_max_size + 1  # the exporter's symbols reach one step beyond the profile
    height, width = (2 * Dim(side, min=1, max=largest) for side in ("height", "width"))
    program = torch.onnx.export(
        network,
        (*inputs(2, 6, 4, 7), torch.tensor([0.0, 1.0])),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=(
            {0: rows, 2: height, 3: width},
            {0: rows},
            {0: rows, 1: length},
            {0: rows},
            {0: rows},
        ),
        custom_translation_table=onnx_translations(opset),
        optimize=False,
        verbose=False,
    )
    assert program is not None
    operators = {node.op_type for node in program.model.graph}
    assert ("Attention" in operators) is (opset == 23) and ("Softmax" in operators) is (opset == 20)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    other = inputs(3, 8, 22, 5)
    arrays = [np.asarray(x) for x in (*other, torch.tensor([0.0, 1.0, 0.0]))]
    names = [value.name for value in session.get_inputs()]
    out = torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])
    assert relative_l2(out[[0, 2]], upstream(module, other)[[0, 2]]) <= FP32_BOUND
    assert relative_l2(out[1], upstream(module, other, skip_layers=skipped)[1]) <= FP32_BOUND
