"""A checkpoint whose pipeline or components a family does not draw is refused by name, whatever its weights fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.families import find_adapter
from ditc.runtime.errors import CheckpointError

SPRINT = "SanaSprintPipeline"


def refusal(source: Path, tmp_path: Path, **index: Any) -> CheckpointError:
    """The error of planning a copy of the checkpoint after these changes to its model_index.json."""
    checkpoint = Path(shutil.copytree(source, tmp_path / "checkpoint"))
    path = checkpoint / "model_index.json"
    values = json.loads(path.read_text()) | index
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "omitted"}))
    opened = open_checkpoint(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        find_adapter(opened).plan(opened, BuildOptions())
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    "name",
    ["SanaControlNetPAGPipeline", SPRINT, "SanaSprintImg2ImgPipeline", "MySanaPipeline"],
)
def test_a_relative_of_sana_pipeline_is_named(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    error = refusal(tiny_checkpoint, tmp_path, _class_name=name)
    assert f"is a {name}, but with this transformer only SanaPipeline is served" in str(error)
    assert ("from_pipe" in str(error.hint)) == ("Sprint" not in name)  # a distilled model would draw noise


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint", "ControlNetInpainting", "PAG", "PAGImg2Img"])
def test_a_relative_of_stable_diffusion_3_pipeline_is_named(
    sd3_checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    name = f"StableDiffusion3{kind}Pipeline"
    assert f"is a {name}, but" in str(refusal(sd3_checkpoint, tmp_path, _class_name=name))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("tiny_checkpoint", "SanaControlNetPipeline"),
        ("sd3_checkpoint", "StableDiffusion3ControlNetPipeline"),
    ],
)
def test_a_controlnet_pipeline_needs_its_controlnet(
    family: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    error = refusal(request.getfixturevalue(family), tmp_path, _class_name=name)
    assert f"has no controlnet, which a {name} needs" in str(error)


@pytest.mark.parametrize("name", [["my_code", "SanaPipeline"], "omitted", 3])
def test_a_pipeline_of_the_checkpoints_own_code_or_without_a_name_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, name: object
) -> None:
    assert "_class_name" in str(refusal(tiny_checkpoint, tmp_path, _class_name=name))


@pytest.mark.parametrize("entry", [[None, None], "omitted", "AutoencoderDC"])
@pytest.mark.parametrize("name", ["tokenizer", "text_encoder", "vae", "transformer", "scheduler"])
@pytest.mark.parametrize("family", ["tiny_checkpoint", "sd3_checkpoint", "mmdit_checkpoint"])
def test_a_component_that_is_left_out_is_named(
    family: str, name: str, entry: object, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    error = refusal(request.getfixturevalue(family), tmp_path, **{name: entry})
    assert f"no {name}" in str(error) or f"without a {name}" in str(error)


@pytest.mark.parametrize("entry", ["omitted", "T5EncoderModel", {}, 1])
def test_a_third_text_encoder_is_left_out_only_on_purpose(
    sd3_checkpoint: Path, tmp_path: Path, entry: object
) -> None:
    error = refusal(sd3_checkpoint, tmp_path, text_encoder_3=entry)
    assert "no text_encoder_3" in str(error) and "as [null, null]" in str(error.hint)


@pytest.mark.parametrize("name", ["controlnet", "image_encoder"])
def test_an_additional_component_is_named(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "with"))
    shutil.copytree(checkpoint / "vae", checkpoint / name)
    error = refusal(checkpoint, tmp_path, **{name: ["diffusers", "AutoencoderDC"]})
    assert f"a component {name} (diffusers.AutoencoderDC), which is not served" in str(error)


def test_the_picture_encoder_of_ip_adapter_is_named_and_the_hint_keeps_the_pictures(
    sd3_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(sd3_checkpoint, tmp_path / "with"))
    shutil.copytree(checkpoint / "vae", checkpoint / "image_encoder")
    error = refusal(checkpoint, tmp_path, image_encoder=["transformers", "SiglipVisionModel"])
    assert "IP-Adapter" in str(error) and '"image_encoder": [null, null]' in str(error.hint)


@pytest.mark.parametrize(
    ("family", "name", "opened_as"),
    [
        # SanaPipeline would condition on its logits.
        ("tiny_checkpoint", "text_encoder", ["transformers", "Gemma2ForCausalLM"]),
        ("tiny_checkpoint", "scheduler", ["my_code", "DPMSolverMultistepScheduler"]),
        ("tiny_checkpoint", "transformer", ["my_code", "SanaTransformer2DModel"]),
        ("sd3_checkpoint", "text_encoder", ["transformers", "CLIPTextModel"]),
    ],
)
def test_a_component_of_another_class_is_named(
    family: str, name: str, opened_as: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    error = refusal(request.getfixturevalue(family), tmp_path, **{name: opened_as})
    assert f"opens {name} as a {'.'.join(opened_as)}" in str(error)
