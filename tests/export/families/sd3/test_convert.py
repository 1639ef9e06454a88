"""Stability's files become diffusers directories and back, bit for bit, as diffusers' own loader reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.convert.layout import NativeOptions
from ditc.export.convert.native import convert, convert_to_native
from ditc.runtime.cli import main
from ditc.runtime.errors import CheckpointError, UsageError

OPTIONS = NativeOptions(resolution=64, flow_shift=3.0)
QK_NORM = {"qk_norm": "rms_norm", "attention_head_dim": 16, "num_attention_heads": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "sd3-medium": {"attention_head_dim": 64, "num_attention_heads": 1},
    "sd3.5-large": QK_NORM,
    "sd3.5-medium": QK_NORM | {"dual_attention_layers": (0, 1)},
}
NETWORK = "model.diffusion_model."
CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))


def random(network: nn.Module) -> nn.Module:
    """Give every tensor random values, biases and norms too, so that no two tensors are equal."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network.eval()


def make_transformer(variant: str) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return random(
        SD3Transformer2DModel(
            sample_size=8,
            num_layers=3,
            joint_attention_dim=24,
            caption_projection_dim=64,
            pooled_projection_dim=20,
            pos_embed_max_size=6,
            **VARIANTS[variant],
        )
    )


def make_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return random(
        AutoencoderKL(
            block_out_channels=(32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            latent_channels=16,
            sample_size=64,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def directory(tmp_path: Path, variant: str) -> Path:
    """A diffusers directory with a transformer and a VAE."""
    path = tmp_path / "diffusers"
    make_transformer(variant).save_pretrained(path / "transformer")
    make_vae().save_pretrained(path / "vae")
    parts = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
    entries = ", ".join(f'"{name}": ["diffusers", "{kind}"]' for name, kind in parts.items())
    (path / "model_index.json").write_text(f'{{"_class_name": "StableDiffusion3Pipeline", {entries}}}')
    return path


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_diffusers_reads_the_native_file_that_is_written(
    tmp_path: Path, directory: Path, variant: str
) -> None:
    native = load_file(convert_to_native(directory, tmp_path / "sd3.safetensors"))
    transformer, vae = make_transformer(variant), make_vae()
    assert_same(convert_sd3_transformer_checkpoint_to_diffusers(dict(native)), transformer.state_dict())
    assert_same(convert_ldm_vae_checkpoint(dict(native), vae.config), vae.state_dict())
    attention = native["first_stage_model.decoder.mid.attn_1.q.weight"]
    assert attention.shape == (64, 64, 1, 1), (
        "it is a 1x1 convolution in Stability's files and a Linear in diffusers"
    )


def test_a_round_trip_is_bit_for_bit_and_gives_the_same_configs(
    tmp_path: Path, directory: Path, variant: str
) -> None:
    native = convert_to_native(directory, tmp_path / "sd3.safetensors")
    out = convert(native, tmp_path / "out", options=OPTIONS)
    first, second = open_checkpoint(directory), open_checkpoint(out)
    for name, made in (("transformer", make_transformer(variant)), ("vae", make_vae())):
        assert_same(second.component(name).tensors, first.component(name).tensors)
        loaded, report = type(made).from_pretrained(out / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        settings = {k: v for k, v in second.component(name).config.items() if not k.startswith("_")}
        assert {k: made.config[k] for k in settings} == {
            k: _same_kind(v, made.config[k]) for k, v in settings.items()
        }
        assert {k: loaded.config[k] for k in made.config if k[0] != "_"}.keys() >= settings.keys()
    assert second.scheduler_config["shift"] == 3.0
    assert_same(load_file(convert_to_native(out, tmp_path / "again.safetensors")), load_file(native))


def _same_kind(value: Any, like: Any) -> Any:
    return tuple(value) if isinstance(like, tuple) else value


def test_scale_and_shift_are_swapped_in_the_two_final_modulations_only(tmp_path: Path) -> None:
    tensors = make_transformer("sd3-medium").state_dict()
    path = _native_file(tmp_path, "sd3-medium")
    native = below(load_file(path), NETWORK)
    last = "joint_blocks.2.context_block.adaLN_modulation.1.bias"
    for theirs, ours in (
        (last, "transformer_blocks.2.norm1_context.linear.bias"),
        _final("bias"),
        _final("weight"),
    ):
        shift, scale = native[theirs].chunk(2)
        assert torch.equal(tensors[ours], torch.cat([scale, shift]))
    first = "joint_blocks.0.x_block.adaLN_modulation.1.bias"
    assert torch.equal(native[first], tensors["transformer_blocks.0.norm1.linear.bias"])


def _final(kind: str) -> tuple[str, str]:
    return f"final_layer.adaLN_modulation.1.{kind}", f"norm_out.linear.{kind}"


def test_a_file_of_the_transformer_alone_needs_no_prefix(tmp_path: Path) -> None:
    path = _native_file(tmp_path, "sd3.5-medium")
    bare = tmp_path / "bare.safetensors"
    save_file(below(load_file(path), NETWORK), bare)
    out = open_checkpoint(convert(bare, tmp_path / "out", options=OPTIONS))
    assert set(out.components) == {"transformer"}
    assert_same(out.component("transformer").tensors, make_transformer("sd3.5-medium").state_dict())


def test_a_file_of_scaled_fp8_becomes_a_directory_of_the_values_that_it_stands_for(tmp_path: Path) -> None:
    native = load_file(_native_file(tmp_path, "sd3.5-medium"))
    saved, expected = {f"{NETWORK}scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in native.items():
        saved[name] = expected[name] = tensor
        if name.startswith(NETWORK) and tensor.dim() == 2:
            scale = tensor.abs().amax() / 448
            saved[name] = (tensor / scale).to(torch.float8_e4m3fn)
            saved[f"{name.removesuffix('weight')}scale_weight"] = scale
            expected[name] = saved[name].float() * scale
    for name, tensors in (("scaled", saved), ("plain", expected)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        convert(tmp_path / f"{name}.safetensors", tmp_path / name, options=OPTIONS)
    for path in (tmp_path / "plain").rglob("*.safetensors"):
        assert_same(load_file(tmp_path / "scaled" / path.relative_to(tmp_path / "plain")), load_file(path))


def test_the_network_of_a_file_is_named_when_it_is_damaged(tmp_path: Path) -> None:
    native = load_file(_native_file(tmp_path, "sd3.5-medium"))
    save_file(native | {f"{T5}shared.weight": torch.ones(3)}, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"net.safetensors: text_encoder_3: shared.weight is \[3\]"):
        convert(tmp_path / "net.safetensors", tmp_path / "out", options=OPTIONS)


def test_text_encoders_in_the_file_become_transformers_directories(tmp_path: Path) -> None:
    torch.manual_seed(2)
    clips = {
        name: random(CLIPTextModelWithProjection(CLIPTextConfig(**sizes)))
        for name, sizes in {
            CLIP_L: _clip(width=64, projection=64, activation="quick_gelu"),
            CLIP_G: _clip(width=128, projection=96, activation="gelu"),
        }.items()
    }
    t5 = random(T5EncoderModel(_t5()))
    native = load_file(_native_file(tmp_path, "sd3-medium"))
    for prefix, clip in clips.items():
        native |= {prefix + name: tensor.half() for name, tensor in clip.state_dict().items()}
    del native[CLIP_L + "text_projection.weight"]
    # As in Comfy's files: T5 is in 8 bits, and some tensors are not read.
    stored = {name: t.to(torch.float8_e4m3fn) for name, t in t5.state_dict().items()}
    native |= {T5 + name: tensor.clone() for name, tensor in stored.items()}
    native |= {"text_encoders.clip_l.logit_scale": torch.ones(())}
    native |= {CLIP_L + "text_model.embeddings.position_ids": torch.arange(77)[None]}
    path = tmp_path / "with_encoders.safetensors"
    save_file(native, path)
    out = convert(path, tmp_path / "out", options=NativeOptions(resolution=64, flow_shift=3.0, dtype="bf16"))

    folders = {"text_encoder": clips[CLIP_L], "text_encoder_2": clips[CLIP_G], "text_encoder_3": t5}
    for folder, made in folders.items():
        loaded, report = type(made).from_pretrained(out / folder, output_loading_info=True, dtype="auto")
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        expected = {name: tensor.half().bfloat16() for name, tensor in made.state_dict().items()}
        if folder == "text_encoder":
            expected["text_projection.weight"] = torch.eye(64).bfloat16()
        if folder == "text_encoder_3":
            expected = {name: stored[name].bfloat16() for name in expected}
        assert_same(loaded.state_dict(), expected)
        for setting in ("hidden_act", "projection_dim", "num_attention_heads", "d_kv", "num_heads", "d_ff"):
            assert getattr(loaded.config, setting, None) == getattr(made.config, setting, None), setting


def _clip(*, width: int, projection: int, activation: str) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 64}
    return sizes | {
        "projection_dim": projection,
        "num_hidden_layers": 2,
        "vocab_size": 99,
        "hidden_act": activation,
    }


def _t5() -> T5Config:
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    return T5Config(**sizes, feed_forward_proj="gated-gelu")


def _native_file(tmp_path: Path, variant: str) -> Path:
    """A native file with the transformer alone, which has the prefix that it has in a whole file."""
    path = tmp_path / f"{variant}-diffusers"
    make_transformer(variant).save_pretrained(path / "transformer")
    (path / "model_index.json").write_text('{"transformer": ["diffusers", "SD3Transformer2DModel"]}')
    return convert_to_native(path, tmp_path / f"{variant}.safetensors")


def test_one_error_names_every_setting_that_the_tensors_do_not_show(tmp_path: Path) -> None:
    path = _native_file(tmp_path, "sd3-medium")
    with pytest.raises(UsageError, match="also give --resolution, --flow-shift") as caught:
        convert(path, tmp_path / "out", options=NativeOptions())
    assert "--resolution 1024 --flow-shift 3" in str(caught.value.hint)
    for wrong in (
        {"resolution": 100},
        {"flow_shift": -1.0},
        {"dtype": "int4"},
        {"position_embedding": "sincos"},
    ):
        with pytest.raises(UsageError, match="--"):
            convert(
                path, tmp_path / "out", options=NativeOptions(**{"resolution": 64, "flow_shift": 3.0} | wrong)
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop(NETWORK + "joint_blocks.1.x_block.mlp.fc1.bias"),
            "1 tensors are missing: joint_blocks.1",
        ),
        (lambda t: t.update({NETWORK + "lora.down": torch.zeros(1)}), r"1 tensors are unknown: lora\.down"),
        (
            lambda t: t.update({"control.weight": torch.zeros(1)}),
            r"belong to no known network: control\.weight",
        ),
        (lambda t: t.update({NETWORK + "pos_embed": torch.zeros(1, 35, 64)}), "pos_embed has 35 positions"),
        (
            lambda t: t.update({NETWORK + "joint_blocks.0.x_block.mlp.fc2.bias": torch.zeros(9)}),
            r"ff\.net\.2\.bias has the shape \[9\], but needs \[64\]",
        ),
    ],
    ids=["missing", "unknown", "foreign", "positions", "misshapen"],
)
def test_a_damaged_file_is_refused_by_the_tensors_name(tmp_path: Path, damage, message) -> None:
    tensors = load_file(_native_file(tmp_path, "sd3-medium"))
    damage(tensors)
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "damaged.safetensors", tmp_path / "out", options=OPTIONS)
    assert not (tmp_path / "out").exists()


def test_the_command_converts_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _native_file(tmp_path, "sd3.5-large")
    line = f"convert {path} {tmp_path / 'out'} --resolution 64"
    assert main(line.split()) == 2
    assert "also give --flow-shift" in capsys.readouterr().err
    assert main([*line.split(), "--flow-shift", "3"]) == 0
    back = tmp_path / "back.safetensors"
    assert main(["convert", "--to-native", str(tmp_path / "out"), str(back)]) == 0
    assert_same(load_file(back), load_file(path))
