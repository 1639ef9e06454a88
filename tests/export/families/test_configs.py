"""Settings of a component's config.json: each is computed as upstream does, or refused before an export begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from pictures import Reference, assert_same, draw

from ditc.export.build.builder import build_bundle
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.families import find_adapter
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.errors import CheckpointError, DitcError

TRUNK = {"depth": 2, "dim_text": 24, "dim_image": 32, "dim_cond": 16}


@pytest.fixture
def sana(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def test_a_learned_variance_is_dropped_as_in_diffusers(sana: Path) -> None:
    torch.manual_seed(0)
    config = SanaTransformer2DModel.load_config(sana / "transformer")
    SanaTransformer2DModel.from_config(config | {"out_channels": 16}).save_pretrained(sana / "transformer")
    ours = draw(TorchModel(sana).pipeline, "a red cat", seed=1)
    size = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.0}
    assert_same(ours, Reference(sana).draw("a red cat", seed=1, **size))


SANA = [
    ("transformer", "guidance_embeds", True, "is SANA-Sprint's"),
    ("transformer", "out_channels", 12, "out_channels is 12"),
    ("transformer", "num_layers", None, "num_layers: expected int"),
    ("transformer", "patch_size", 0, "patch_size: expected an integer >= 1"),
    ("transformer", "timestep_scale", float("nan"), "timestep_scale: expected a finite number"),
    ("transformer", "interpolation_scale", 0, "positive interpolation_scale"),
    ("transformer", "caption_channels", 25, "the text encoder's states have 24 channels"),
    ("vae", "encoder_block_out_channels", "x", "encoder_block_out_channels: expected a list"),
    ("vae", "encoder_block_out_channels", [], "encoder_block_types has 2 entries"),
    ("vae", "decoder_layers_per_block", ["1", "1"], r"decoder_layers_per_block\[0\]: expected int"),
    ("vae", "decoder_act_fns", ["silu"], "decoder_act_fns has 1 entries"),
    ("vae", "in_channels", 4, "a picture has 3"),
    ("vae", "scaling_factor", 0.0, "scaling_factor is 0"),
    ("vae", "latent_channels", 16, "the VAE's latents have 16 channels"),
    ("vae", "latent_channels", 9, "a shortcut cannot divide 32 channels into 9"),
    ("text_encoder", "model_type", "gemma", "model_type is 'gemma'"),
    ("text_encoder", "use_bidirectional_attention", True, "use_bidirectional_attention is True"),
    ("text_encoder", "sliding_window", None, "sliding_window is None"),
    (
        "text_encoder",
        "rope_parameters",
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        "rope_type",
    ),
    ("text_encoder", "layer_types", ["chunked_attention"] * 2, "layer_types is"),
    ("text_encoder", "num_attention_heads", 0, "transformers refuses the gemma2 config.json"),
    ("text_encoder", "transformers_weights", "other.safetensors", "names its weights"),
    ("text_encoder", "num_hidden_layers", 10**9, "num_hidden_layers is 1000000000 in the text encoder's"),
    ("transformer", "num_layers", 10**9, "num_layers: expected an integer <= 1048576"),
    ("vae", "encoder_layers_per_block", [10**9, 1], "expected an integer <= 1048576"),
]
SD3 = [
    ("transformer", "out_channels", 32, "out_channels is 32"),
    ("transformer", "pos_embed_max_size", None, "pos_embed_max_size: expected int"),
    ("vae", "block_out_channels", None, "block_out_channels: expected a list"),
    ("vae", "norm_num_groups", 3, "norm_num_groups 3 does not divide"),
    ("vae", "in_channels", 1, "a picture has 3"),
    ("vae", "latents_mean", [0.0], "latents_mean is"),
    ("text_encoder", "eos_token_id", [1, 2], "eos_token_id is"),
    ("text_encoder", "layer_norm_eps", None, "layer_norm_eps is None"),
    ("text_encoder_2", "projection_dim", None, "projection_dim is None"),
    ("text_encoder_2", "num_attention_heads", -1, "num_attention_heads is -1"),
    ("text_encoder_3", "model_type", "umt5", "model_type is 'umt5'"),
    ("text_encoder_3", "is_decoder", True, "is_decoder is True"),
    ("text_encoder_3", "relative_attention_max_distance", 10**9, "relative_attention_max_distance is 10"),
    ("vae", "block_out_channels", [32] * 11, "down_block_types has 4 entries|has 11 entries"),
]
MMDIT = [
    ("transformer", "trunk", None, "trunk is None"),
    ("transformer", "trunk", TRUNK | {"depth": "2"}, "depth = '2'"),
    ("transformer", "trunk", TRUNK | {"ff_kwargs": 3}, "ff_kwargs = 3"),
    ("transformer", "out_channels", 9, "out_channels is 9"),
    ("transformer", "sample_size", "4", "sample_size: expected int"),
]
CASES = [
    *(("tiny_checkpoint", *case) for case in SANA),
    *(("sd3_checkpoint", *case) for case in SD3),
    *(("mmdit_checkpoint", *case) for case in MMDIT),
]


@pytest.mark.parametrize(("family", "component", "setting", "value", "message"), CASES)
def test_a_setting_that_is_not_computed_is_refused_in_the_plan(
    family: str,
    component: str,
    setting: str,
    value: Any,
    message: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    checkpoint = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "checkpoint"))
    path = checkpoint / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    opened = open_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        find_adapter(opened).plan(opened, BuildOptions())
    assert caught.value.hint


def test_settings_that_contradict_each_other_are_refused_before_the_export(sana: Path) -> None:
    path = sana / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_activation": "unknown"}))
    opened = open_checkpoint(sana)
    plan = find_adapter(opened).plan(opened, BuildOptions())
    with pytest.raises(
        CheckpointError, match=r"no network can be made from the config.json.*unknown"
    ) as caught:
        find_adapter(opened).load(opened, plan, "text_encoder", BuildOptions())
    assert caught.value.hint


@pytest.mark.parametrize(
    ("family", "component", "stage", "setting", "prefix"),
    [
        ("tiny_checkpoint", "transformer", "denoiser", "num_layers", "transformer_blocks"),
        ("tiny_checkpoint", "text_encoder", "text_encoder", "num_hidden_layers", "layers"),
        ("sd3_checkpoint", "transformer", "denoiser", "num_layers", "transformer_blocks"),
        ("sd3_checkpoint", "text_encoder", "text_encoder", "num_hidden_layers", "encoder.layers"),
        ("sd3_checkpoint", "text_encoder_3", "text_encoder_3", "num_layers", "encoder.block"),
        ("sd3_checkpoint", "vae", "vae_decoder", "layers_per_block", "encoder.down_blocks.0.resnets"),
    ],
)
def test_layers_are_counted_in_the_weights_before_modules_are_made(
    family: str,
    component: str,
    stage: str,
    setting: str,
    prefix: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    checkpoint = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "checkpoint"))
    path = checkpoint / component / "config.json"
    config = json.loads(path.read_text()) | {setting: 20_000}
    if "layer_types" in config:
        config["layer_types"] = ["sliding_attention"] * 20_000
    path.write_text(json.dumps(config))
    opened = open_checkpoint(checkpoint)
    plan = find_adapter(opened).plan(opened, BuildOptions())
    with pytest.raises(
        CheckpointError, match=rf"{setting} is 20000 .* have \d layers \({prefix}\)"
    ) as caught:
        find_adapter(opened).load(opened, plan, stage, BuildOptions())
    assert caught.value.hint


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("ditc.json", {"num_inference_steps": 10**9}, "num_inference_steps is 1000000000"),
        ("ditc.json", {"num_inference_steps": 10**400}, r"not JSON: the number 10+\.\.\. has 401 digits"),
        (
            "ditc.json",
            {"resolution_bins": [[64, 64], [31, 128]]},
            "could not draw its default size .*, 31x128",
        ),
        ("ditc.json", {"complex_human_instruction": ["word " * 10**5]}, "the text has .* bytes"),
        ("ditc.json", {"max_sequence_length": 10**5}, "a text has 100000 tokens"),
        ("scheduler/scheduler_config.json", {"flow_shift": 1e-4}, "no bundle may hold the value .*shift"),
        ("tokenizer/tokenizer_config.json", {"extra_ids": 2**31}, "extra_ids = 2147483648, and"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -77}, "model_max_length -77"),
        ("tokenizer/tokenizer_config.json", {"unk_token": ""}, "special tokens that have no id"),
    ],
)
def test_what_no_bundle_could_draw_is_refused_before_the_export(
    file: str, settings: dict[str, Any], message: str, sana: Path, tmp_path: Path
) -> None:
    path = sana / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(DitcError, match=message) as caught:
        build_bundle(sana, tmp_path / "bundle", BuildOptions())
    assert caught.value.hint
    assert not (tmp_path / "bundle").exists()
