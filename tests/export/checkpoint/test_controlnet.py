"""A ControlNet in a folder of its own: joined with a checkpoint it is the same as in one folder, and else refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditc.export.build.builder import build_bundle
from ditc.export.build.noop import up_to_date
from ditc.export.checkpoint.controlnet import open_joined
from ditc.export.contract import BuildOptions
from ditc.export.families import find_adapter
from ditc.runtime.cli import main
from ditc.runtime.errors import CheckpointError, DitcError, UsageError


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def apart(joint: Path, folder: Path, plain_class: str) -> tuple[Path, Path]:
    """The checkpoint without its ControlNet, and the ControlNet's folder."""
    plain, controlnet = folder / "plain", folder / "edges"
    shutil.copytree(joint, plain)
    (plain / "controlnet").rename(controlnet)
    index = json.loads((plain / "model_index.json").read_text())
    del index["controlnet"]
    (plain / "model_index.json").write_text(json.dumps(index | {"_class_name": plain_class}))
    return plain, controlnet


@pytest.fixture
def parts(control_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    return apart(control_checkpoint, tmp_path, "SanaPipeline")


def test_a_build_of_both_parts_is_that_of_one_folder(
    parts: tuple[Path, Path], control_bundle: Path, tmp_path: Path
) -> None:
    plain, controlnet = parts
    bundle = Path(shutil.copytree(control_bundle, tmp_path / "bundle"))
    options = BuildOptions(controlnet=controlnet)
    report = build_bundle(plain, bundle, options)
    assert {event.status for event in report.events} == {"reused"}
    again = up_to_date(plain, bundle, options)
    assert again is not None and again.manifest.digest == report.manifest.digest
    assert up_to_date(plain, bundle, BuildOptions()) is None
    edited(controlnet / "config.json", _name_or_path="elsewhere")
    assert up_to_date(plain, bundle, options) is None  # a file of the ControlNet has changed


@pytest.mark.parametrize("sd3_control_checkpoint", ["image-only"], indirect=True)
def test_a_controlnet_that_takes_the_transformers_position_embedding_is_planned_alike(
    sd3_control_checkpoint: Path, tmp_path: Path
) -> None:
    plain, controlnet = apart(sd3_control_checkpoint, tmp_path, "StableDiffusion3Pipeline")
    joined, joint = (
        find_adapter(opened).plan(opened, BuildOptions())
        for opened in (open_joined(plain, controlnet=controlnet), open_joined(sd3_control_checkpoint))
    )
    assert joined == joint


def test_parity_takes_the_same_two_parts(
    parts: tuple[Path, Path], control_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, controlnet = parts
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")
    case = ["--prompts", str(prompts), "--seeds", "0", "--threads", "1", "--no-edits"]
    command = ["parity", str(control_bundle), "--against", str(plain), "--level", "trajectory", *case]
    assert main([*command, "--controlnet", str(controlnet), "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["levels"]
    assert {"PyTorch fp32", "diffusers"} <= {line["against"] for line in lines if line["verdict"] == "pass"}
    assert main(command) == 2
    assert "the bundle has a ControlNet" in capsys.readouterr().err


def _another_family(plain: Path, controlnet: Path) -> None:
    edited(controlnet / "config.json", _class_name="SD3ControlNetModel")


def _another_width(plain: Path, controlnet: Path) -> None:
    edited(controlnet / "config.json", num_attention_heads=4, cross_attention_dim=64)


def _a_transformer(plain: Path, controlnet: Path) -> None:
    shutil.rmtree(controlnet)
    shutil.copytree(plain / "transformer", controlnet)


def _a_pipeline(plain: Path, controlnet: Path) -> None:
    (controlnet / "model_index.json").write_text("{}")


def _without_class(plain: Path, controlnet: Path) -> None:
    config = json.loads((controlnet / "config.json").read_text())
    del config["_class_name"]
    (controlnet / "config.json").write_text(json.dumps(config))


def _beside_one(plain: Path, controlnet: Path) -> None:
    shutil.copytree(controlnet, plain / "controlnet")
    index = {"_class_name": "SanaControlNetPipeline", "controlnet": ["diffusers", "SanaControlNetModel"]}
    edited(plain / "model_index.json", **index)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (
            _another_family,
            CheckpointError,
            "edges is a SD3ControlNetModel, but .*plain takes a SanaControlNetModel",
        ),
        (_another_width, CheckpointError, "edges: width is 64 in the ControlNet's config.json, but 32"),
        (
            _a_transformer,
            CheckpointError,
            "is no ControlNet: its config.json is that of 'SanaTransformer2DModel'",
        ),
        (_without_class, CheckpointError, "edges is no ControlNet: its config.json does not say"),
        (_a_pipeline, CheckpointError, "edges holds a whole pipeline"),
        (lambda _, folder: shutil.rmtree(folder), CheckpointError, "edges is not a directory"),
        (
            lambda _, folder: (folder / "config.json").unlink(),
            CheckpointError,
            "edges/config.json does not exist",
        ),
        (_beside_one, UsageError, "plain has a ControlNet of its own"),
        (
            lambda plain, _: edited(plain / "model_index.json", _class_name="SanaPAGPipeline"),
            CheckpointError,
            "plain takes no ControlNet",
        ),
    ],
    ids=["family", "width", "transformer", "no-class", "pipeline", "missing", "no-config", "two", "pag"],
)
def test_what_cannot_be_joined_is_refused_before_weights_are_read(
    parts: tuple[Path, Path],
    tmp_path: Path,
    damage: Callable[[Path, Path], object],
    kind: type[DitcError],
    message: str,
) -> None:
    plain, controlnet = parts
    damage(plain, controlnet)
    with pytest.raises(kind, match=message) as caught:
        build_bundle(plain, tmp_path / "bundle", BuildOptions(controlnet=controlnet))
    assert caught.value.hint and not (tmp_path / "bundle").exists()


def test_a_sprint_checkpoint_takes_none(
    sprint_checkpoint: Path, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="takes no ControlNet"):
        build_bundle(sprint_checkpoint, tmp_path / "bundle", BuildOptions(controlnet=parts[1]))


def test_a_hub_id_is_answered_with_how_to_fetch_it(control_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory") as caught:
        open_joined(control_checkpoint, controlnet=Path("org/edges"))
    assert "hf download org/edges" in str(caught.value.hint)
