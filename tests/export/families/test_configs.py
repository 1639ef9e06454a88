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

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.families import find_adapter
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.errors import CheckpointError

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
