"""What the SD3 adapter plans for a checkpoint before any weight is read, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions, ModelPlan
from ditc.export.families import find_adapter
from ditc.runtime.bundle.manifest import SkipLayerGuidance
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.schedulers import SchedulerKind
from ditc.runtime.spec import CONDITIONER, DENOISER, VAE_DECODER, VAE_ENCODER, Backend, Precision

ENCODERS = {"text_encoder", "text_encoder_2", "text_encoder_3"}


@pytest.fixture
def checkpoint(sd3_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd3_checkpoint, tmp_path / "checkpoint"))


def plan(checkpoint: Path, options: BuildOptions | None = None) -> ModelPlan:
    opened = open_checkpoint(checkpoint)
    return find_adapter(opened).plan(opened, options or BuildOptions())


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_without_ditc_json_the_defaults_are_those_of_diffusers_pipeline(checkpoint: Path) -> None:
    (checkpoint / "ditc.json").unlink()
    made = plan(checkpoint)
    assert (made.defaults.num_inference_steps, made.defaults.guidance_scale) == (28, 7.0)
    assert (made.defaults.height, made.defaults.width) == (64, 64)
    assert [text.length for text in made.text] == [77, 77, 256]
    assert made.stages[DENOISER].spec.profile["text_length"].opt == 333


def test_the_first_clip_pads_with_its_end_of_text_and_the_second_with_token_0(checkpoint: Path) -> None:
    assert [text.pad_token_id for text in plan(checkpoint).text] == [517, 0, 0]
    assert all(text.mask is None for text in plan(checkpoint).text), "padding is attended to, without a mask"


def test_the_scheduler_is_shifted_twice_as_in_diffusers(checkpoint: Path) -> None:
    scheduler = plan(checkpoint).scheduler
    assert (scheduler.kind, scheduler.shift) == (SchedulerKind.EULER, 3.0)
    assert scheduler.sigma_min == pytest.approx(3 * 0.001 / (1 + 2 * 0.001), rel=1e-6)


def test_specs_agree_between_connected_stages(checkpoint: Path) -> None:
    stages = plan(checkpoint, BuildOptions(max_batch=3)).stages
    denoiser, conditioner = stages[DENOISER].spec, stages[CONDITIONER].spec
    given = {out.name: out for name in ENCODERS for out in stages[name].spec.outputs}
    for tensor in conditioner.inputs:
        assert (given[tensor.name].dtype, given[tensor.name].shape[-1]) == (tensor.dtype, tensor.shape[-1])
    for output in conditioner.outputs:
        assert denoiser.input(output.name) == output
    assert denoiser.profile["rows"].max == 9, "skip-layer guidance has three rows per sample"
    assert set(stages) == {*ENCODERS, CONDITIONER, DENOISER, VAE_DECODER, VAE_ENCODER}


def test_t5_can_be_left_out_and_its_tokens_are_zeros(checkpoint: Path) -> None:
    change(checkpoint / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    made = plan(checkpoint)
    assert [text.stage for text in made.text] == ["text_encoder", "text_encoder_2"]
    assert made.stages[CONDITIONER].facts == {"zero_tokens": 16}
    assert made.stages[DENOISER].spec.profile["text_length"].opt == 77 + 16


@pytest.mark.parametrize("missing", ["text_encoder", "text_encoder_2", "tokenizer_2", "tokenizer_3"])
def test_a_missing_component_is_named(checkpoint: Path, missing: str) -> None:
    change(checkpoint / "model_index.json", **{missing: [None, None]})
    with pytest.raises(CheckpointError, match=f"no {missing}") as caught:
        plan(checkpoint)
    assert "text_encoder_3" in str(caught.value.hint)


def test_a_folder_that_the_index_names_but_that_does_not_exist_is_reported(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "text_encoder_2")
    with pytest.raises(CheckpointError, match="has no folder 'text_encoder_2'"):
        plan(checkpoint)


@pytest.mark.parametrize(
    ("folder", "values", "message"),
    [
        ("vae", {"latent_channels": 4}, "the VAE has 4 latent channels"),
        ("text_encoder_2", {"projection_dim": 30}, "the CLIPs give 38 pooled channels"),
        ("text_encoder_2", {"hidden_size": 64}, "the CLIPs' states have 80 channels"),
        ("text_encoder_3", {"d_model": 64}, "text_encoder_3's states have 64 channels"),
        ("transformer", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ("transformer", {"joint_norm": True}, "joint_norm"),
    ],
)
def test_components_of_different_models_are_refused(checkpoint, folder, values, message) -> None:
    change(checkpoint / folder / "config.json", **values)
    with pytest.raises(CheckpointError, match=message):
        plan(checkpoint)


def test_a_size_beyond_the_position_embedding_is_refused_before_the_build(
    checkpoint: Path,
) -> None:
    with pytest.raises(
        UsageError, match=r"208 pixels are more than the position embedding covers: 192"
    ) as caught:
        plan(checkpoint, BuildOptions(resolution=208))
    assert "at most 192" in str(caught.value.hint)
    height = plan(checkpoint, BuildOptions(resolution=160)).stages[DENOISER].spec.profile["height"]
    assert height.max == 24, "twice the default would be 40 cells, but the embedding covers 24"


def test_a_text_longer_than_diffusers_allows_is_refused(checkpoint: Path) -> None:
    change(checkpoint / "ditc.json", max_sequence_length=513)
    with pytest.raises(CheckpointError, match="max_sequence_length is 513"):
        plan(checkpoint)


def test_layers_named_in_ditc_json_are_skipped_by_default_as_in_diffusers(checkpoint: Path) -> None:
    skip = plan(checkpoint).defaults.skip_layer_guidance
    assert skip == SkipLayerGuidance(layers=(1,), scale=2.8, start=0.01, stop=0.8)
    assert plan(checkpoint).stages[DENOISER].facts == {"skip_layers": [1]}


def test_sd35_medium_can_skip_its_three_layers_but_does_not_unless_asked(checkpoint: Path) -> None:
    (checkpoint / "ditc.json").unlink()
    assert plan(checkpoint).defaults.skip_layer_guidance is None, "a network of three blocks has no block 9"
    change(checkpoint / "transformer" / "config.json", num_layers=24)
    assert plan(checkpoint).defaults.skip_layer_guidance == SkipLayerGuidance(
        layers=(7, 8, 9), scale=0.0, start=0.01, stop=0.2
    )
    change(checkpoint / "transformer" / "config.json", dual_attention_layers=[])
    assert plan(checkpoint).defaults.skip_layer_guidance is None


def test_a_skip_layer_that_does_not_exist_is_refused(checkpoint: Path) -> None:
    change(checkpoint / "ditc.json", skip_guidance_layers=[1, 9])
    with pytest.raises(UsageError, match=r"skip layers \[9\]"):
        plan(checkpoint)


def test_text_encoders_and_vae_are_never_fp16(checkpoint: Path) -> None:
    for backend, wanted in ((Backend.ONNXRUNTIME, Precision.FP32), (Backend.TENSORRT_RTX, Precision.BF16)):
        stages = plan(checkpoint, BuildOptions(precision=Precision.FP16, backend=backend)).stages
        assert stages[DENOISER].precision is Precision.FP16
        assert {stages[name].precision for name in (*ENCODERS, VAE_DECODER, VAE_ENCODER)} == {wanted}
