"""model_index.json decides what a component is, as in diffusers; a file that contradicts it is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pictures import Reference, assert_same, draw

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions, ModelPlan
from ditc.export.families import find_adapter
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.errors import CheckpointError

EULER = "FlowMatchEulerDiscreteScheduler"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def edit(path: Path, **values: Any) -> None:
    """Set the keys of a JSON file; the key of a None is removed."""
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def plan(checkpoint: Path) -> ModelPlan:
    opened = open_checkpoint(checkpoint)
    return find_adapter(opened).plan(opened, BuildOptions())


def test_the_scheduler_is_the_one_that_model_index_names(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(checkpoint / "model_index.json", scheduler=["diffusers", EULER])
    ours = draw(TorchModel(checkpoint).pipeline, "a red cat", seed=1)
    assert "saved by DPMSolverMultistepScheduler, but model_index.json names Flow" in caplog.text
    defaults = json.loads((checkpoint / "ditc.json").read_text())
    steps, scale = defaults["num_inference_steps"], defaults["guidance_scale"]
    theirs = Reference(checkpoint)
    assert type(theirs.pipeline.scheduler).__name__ == EULER
    size = {"height": 64, "width": 64, "num_inference_steps": steps, "guidance_scale": scale}
    assert_same(ours, theirs.draw("a red cat", seed=1, **size))


@pytest.mark.parametrize(
    "file", ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
def test_a_config_need_not_repeat_its_class(checkpoint: Path, tiny_checkpoint: Path, file: str) -> None:
    edit(checkpoint / file, _class_name=None)
    assert plan(checkpoint) == plan(tiny_checkpoint)


@pytest.mark.parametrize("saved_as", ["SD3Transformer2DModel", ["code", "SanaTransformer2DModel"], 3])
def test_a_network_that_another_class_saved_is_refused_and_both_are_named(
    checkpoint: Path, saved_as: object
) -> None:
    edit(checkpoint / "transformer" / "config.json", _class_name=saved_as)
    with pytest.raises(CheckpointError, match=r"as a SanaTransformer2DModel.*saved by") as caught:
        plan(checkpoint)
    assert repr(saved_as) in str(caught.value)


def test_settings_that_were_defaults_when_saved_are_todays_defaults(checkpoint: Path) -> None:
    edit(
        checkpoint / "transformer" / "config.json", _use_default_values=["timestep_scale"], timestep_scale=7.0
    )
    edit(checkpoint / "scheduler" / "scheduler_config.json", _use_default_values=["flow_shift"])
    scheduler = plan(checkpoint).scheduler
    assert (scheduler.timestep_scale, scheduler.shift) == (1.0, 1.0)


@pytest.mark.parametrize(
    "entry", [["diffusers"], [None, "AutoencoderDC"], ["diffusers", None], [1, 2], ["a", "b", "c"]]
)
def test_an_entry_of_another_form_is_refused(checkpoint: Path, entry: object) -> None:
    edit(checkpoint / "model_index.json", vae=entry)
    with pytest.raises(CheckpointError, match=r"vae = .* neither \[library, class\] nor"):
        plan(checkpoint)
