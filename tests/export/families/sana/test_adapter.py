"""What the Sana adapter plans for a checkpoint before any weight is read, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions, ModelPlan
from ditc.export.families import find_adapter
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.spec import (
    CONDITIONER,
    DENOISER,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    Precision,
    Range,
)
from ditc.runtime.text import Tokenizer, with_instruction, with_length
from ditc.runtime.vae import check_tiles


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def plan(checkpoint: Path, options: BuildOptions | None = None) -> ModelPlan:
    opened = open_checkpoint(checkpoint)
    return find_adapter(opened).plan(opened, options or BuildOptions())


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_defaults_come_from_ditc_json(checkpoint: Path) -> None:
    defaults = plan(checkpoint).defaults
    assert (defaults.height, defaults.width, defaults.num_inference_steps) == (64, 64, 4)
    assert defaults.guidance_scale == 3.0 and defaults.bins == ()


def test_without_ditc_json_the_defaults_are_those_of_diffusers_pipeline(checkpoint: Path) -> None:
    (checkpoint / "ditc.json").unlink()
    made = plan(checkpoint)
    (text,) = made.text
    assert (made.defaults.num_inference_steps, made.defaults.guidance_scale) == (20, 4.5)
    assert (
        text.length == 300 and text.select is not None and (text.select.first, text.select.last) == (1, 299)
    )
    assert text.prefix.startswith("Given a user prompt") and text.negative_prefix == ""


def test_a_request_with_other_text_settings_has_the_spec_of_a_build_with_them(checkpoint: Path) -> None:
    (text,) = plan(checkpoint).text
    tokenizer = Tokenizer(checkpoint / "tokenizer" / "tokenizer.json")
    for lines, length in ((["Draw this:", "User: "], 12), (["Draw this:"], 7), ([], 5)):
        change(checkpoint / "ditc.json", complex_human_instruction=lines, max_sequence_length=length)
        (built,) = plan(checkpoint).text
        assert with_length(with_instruction(text, lines, tokenizer), length) == built
        assert with_instruction(with_length(built, text.length), [], tokenizer) == text


def test_the_text_spec_matches_diffusers_pipeline(checkpoint: Path) -> None:
    (text,) = plan(checkpoint).text
    assert text.lower and text.strip and text.stage == TEXT_ENCODER and text.pad_token_id == 0
    assert text.length == text.max_length == text.negative_max_length == 12


def test_specs_agree_between_connected_stages(checkpoint: Path) -> None:
    stages = plan(checkpoint, BuildOptions(max_batch=3)).stages
    denoiser, conditioner = stages[DENOISER].spec, stages[CONDITIONER].spec
    for output in conditioner.outputs:
        assert denoiser.input(output.name) == output
    assert denoiser.profile["batch"].max == 3 and denoiser.profile["rows"].max == 6
    for name in ("height", "width"):
        assert denoiser.profile[name].max <= stages[VAE_DECODER].spec.profile[name].max
    assert set(stages) == {TEXT_ENCODER, CONDITIONER, DENOISER, VAE_DECODER, VAE_ENCODER}


def test_the_resolution_option_sets_the_default_and_the_range(checkpoint: Path) -> None:
    made = plan(checkpoint, BuildOptions(resolution=96))
    assert (made.defaults.height, made.defaults.width) == (96, 96)
    height = made.stages[DENOISER].spec.profile["height"]
    assert (height.min, height.opt, height.max) == (24, 48, 96)
    assert made.defaults.tiling is None


def test_a_model_built_for_4k_decodes_in_tiles_whatever_its_training_resolution(checkpoint: Path) -> None:
    """Without tiles, the check of the demo's decoder at 4096 px took 11 GB."""
    made = plan(checkpoint, BuildOptions(resolution=4096))
    assert made.defaults.tiling is not None
    assert made.stages[VAE_DECODER].spec.profile["height"].max == made.defaults.tiling.tile // 2


def test_every_tile_of_a_tiled_picture_is_within_the_vaes_ranges(checkpoint: Path) -> None:
    (checkpoint / "ditc.json").unlink()
    change(checkpoint / "transformer" / "config.json", sample_size=2048)  # 4096 pixels, because a cell has 2
    made = plan(checkpoint)
    spec, tiling = made.stages[VAE_DECODER].spec, made.defaults.tiling
    assert tiling is not None and spec.profile["height"] == Range(1, tiling.tile // 2, tiling.tile // 2)
    assert made.stages[VAE_ENCODER].spec.profile["image_width"] == Range(2, tiling.tile, tiling.tile, 2)
    for side in range(1024, 4097, 2):  # the sides in cells that the denoiser can draw
        check_tiles(side, 2048, spec, tiling, scale=2, default=tiling)
    with pytest.raises(UsageError, match="4096x4096 decoded in one piece") as caught:
        check_tiles(2048, 2048, spec, None, scale=2, default=tiling)
    assert "Tiling(tile=512, stride=448)" in str(caught.value.hint)


def test_in_onnx_runtime_only_the_denoiser_and_the_conditioner_are_fp16(checkpoint: Path) -> None:
    stages = plan(checkpoint, BuildOptions(precision=Precision.FP16)).stages
    sixteen = {name for name, stage in stages.items() if stage.precision is Precision.FP16}
    assert sixteen == {CONDITIONER, DENOISER}


def test_a_resolution_that_is_not_a_whole_number_of_cells_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="resolution 65 is not a multiple of 2"):
        plan(checkpoint, BuildOptions(resolution=65))


def test_an_unknown_transformer_is_refused_and_the_known_families_are_listed(checkpoint: Path) -> None:
    change(checkpoint / "transformer" / "config.json", _class_name="OtherTransformer2DModel")
    change(checkpoint / "model_index.json", transformer=["diffusers", "OtherTransformer2DModel"])
    with pytest.raises(CheckpointError, match="OtherTransformer2DModel") as caught:
        find_adapter(open_checkpoint(checkpoint))
    assert "sana" in str(caught.value.hint)
