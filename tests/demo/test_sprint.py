"""The distilled demo model: it joins to a checkpoint, its sampling is SanaSprintPipeline's, and its guidance works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel

from demo.concepts import CHECKPOINT_DIR, SPRINT_DIR, load_split
from demo.errors import DemoError
from demo.evaluate import defaults, draw, load_pipeline
from demo.join import join, main
from demo.references import concept_ranks
from demo.train import sprint, sprint_checkpoint
from demo.train.guided import Guided
from demo.train.loop import save_fresh_state


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined") / "checkpoint"
    join(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(joined: Path) -> Any:
    return load_pipeline(joined)


def test_plain_diffusers_loads_the_joined_checkpoint(pipeline: Any) -> None:
    assert type(pipeline).__name__ == "SanaSprintPipeline"
    assert type(pipeline.scheduler).__name__ == "SCMScheduler"
    assert pipeline.transformer.config.guidance_embeds


def test_the_distilled_model_is_small_and_holds_safetensors_and_json_only() -> None:
    files = [f for f in SPRINT_DIR.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".safetensors", ".json"}
    assert sum(f.stat().st_size for f in files) <= sprint_checkpoint.MAX_BYTES


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_draws_what_is_asked_for(pipeline: Any, joined: Path, steps: int) -> None:
    concepts = ["red heart", "banana", "frog", "crown"]
    prompts = [f"{c}, flat style" for c in concepts]
    drawn = draw(pipeline, prompts, defaults(joined, steps))
    assert (concept_ranks(drawn, concepts, load_split()) == 0).all()


def test_the_guidance_scale_changes_the_picture(pipeline: Any, joined: Path) -> None:
    weak, strong = (
        draw(pipeline, ["frog, flat style"], {**defaults(joined), "guidance_scale": g}).astype(int)
        for g in (2.0, 4.5)
    )
    assert np.abs(weak - strong).mean() > 0.5  # of 255


def test_a_folder_that_holds_something_else_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main([str(tmp_path)]) == 1
    assert "is not a checkpoint. hint: choose another folder" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_an_older_joined_checkpoint_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    join(folder)
    (folder / "model_index.json").write_text("{}")
    join(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "SanaSprintPipeline"


def test_a_student_begins_as_its_teacher_whatever_the_guidance() -> None:
    teacher = SanaTransformer2DModel.from_pretrained(
        CHECKPOINT_DIR / "transformer", torch_dtype=torch.float32
    )
    student = sprint.student_of(teacher)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, 8, 8, generator=generator)
    states = torch.randn(3, 7, 256, generator=generator)
    s = torch.tensor([1.0, 0.78, 0.3])
    with torch.inference_mode():
        expected = teacher(x, states, s * 1000).sample
        for guidance in (0.2, 0.45):
            flow = student(x, states, s, guidance=torch.full((3,), guidance)).sample
            # The curve of the time embedding over s is fitted, not copied: an error of 1e-3 of the flow's variance.
            assert ((flow - expected).square().mean((1, 2, 3)) < 1e-2 * expected.var()).all()


def test_two_steps_are_those_of_diffusers(pipeline: Any, joined: Path) -> None:
    prompt, generator = "frog, flat style", torch.Generator().manual_seed(3)
    arguments = {**defaults(joined), "output_type": "latent"}
    expected = pipeline(prompt, generator=torch.Generator().manual_seed(3), **arguments).images
    states, mask = pipeline.encode_prompt(
        prompt, max_sequence_length=32, complex_human_instruction=None, device=torch.device("cpu")
    )
    noise = torch.randn(1, 32, 8, 8, generator=generator)
    guided = Guided(noise, noise, torch.tensor([arguments["guidance_scale"]]), states, mask)
    with torch.inference_mode():
        _, second = sprint.two_steps(pipeline.transformer, guided, generator)
    torch.testing.assert_close(second, expected, atol=1e-4, rtol=0)  # other order of the same fp32 operations


def test_the_trained_state_becomes_the_same_files_again(tmp_path: Path) -> None:
    shipped = SanaTransformer2DModel.from_pretrained(SPRINT_DIR / "transformer", torch_dtype=torch.float32)
    save_fresh_state(tmp_path, sprint.NAME, shipped)
    sprint_checkpoint.run(tmp_path, tmp_path / "again")
    for name in (
        "transformer/diffusion_pytorch_model.safetensors",
        "ditc.json",
        "scheduler/scheduler_config.json",
    ):
        assert (tmp_path / "again" / name).read_bytes() == (SPRINT_DIR / name).read_bytes()


def test_a_missing_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"sprint.pt is missing.*python -m demo.train sprint"):
        sprint_checkpoint.run(tmp_path, tmp_path / "new")
