"""Parity of an SD3 bundle at every level, and defects in the places where ports of SD3 often go wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from planted import SETTINGS, context_of, failures, module_of, patch_forward, torch_candidate

from ditc.parity.levels import LEVELS
from ditc.parity.reference.pytorch import TorchModel
from ditc.parity.results import Verdict
from ditc.runtime.cli import main
from ditc.runtime.conditioning import Conditioning
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.spec import CONDITIONER, DENOISER, VAE_DECODER
from ditc.runtime.tolerances import Level

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def bundle(sd3_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle, because parity writes a certificate into it."""
    return Path(shutil.copytree(sd3_bundle, tmp_path_factory.mktemp("sd3") / "bundle"))


@pytest.fixture(scope="module")
def proven(bundle: Path, sd3_checkpoint: Path) -> tuple[Path, list[dict[str, str]]]:
    """A reference file, and the results of all levels as `ditc parity --json` gives them."""
    reference, out = bundle.parent / "reference.safetensors", bundle.parent / "parity.json"
    arguments = [
        "--seeds",
        "0",
        "--prompts",
        str(_prompts(bundle.parent)),
        "--steps",
        "3",
        "--threads",
        "1",
    ]
    arguments += ["--save-reference", str(reference), "--json"]
    with pytest.MonkeyPatch.context() as patch, out.open("w") as stream:
        patch.setattr("sys.stdout", stream)
        code = main(["parity", str(bundle), "--against", str(sd3_checkpoint), *arguments])
    levels = json.loads(out.read_text())["levels"]
    assert code == 0, [one for one in levels if one["verdict"] == "fail"]
    return reference, levels


def _prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("a red cat\n")
    return path


def test_every_level_passes_for_every_stage(proven) -> None:
    _, levels = proven
    passed = {(one["level"], one["stage"]) for one in levels if one["verdict"] == "pass"}
    for stage in (*ENCODERS, CONDITIONER, DENOISER, VAE_DECODER):
        assert ("stage", stage) in passed
    assert {level for level, _ in passed} >= {"graph", "module", "stage", "step", "trajectory", "picture"}
    assert {"scheduler", "tokenizer"} <= {stage for level, stage in passed if level == "graph"}


def test_modules_of_all_text_encoders_are_compared_with_diffusers(proven) -> None:
    _, levels = proven
    modules = [one for one in levels if one["level"] == "module" and one["against"] == "diffusers"]
    assert {one["stage"] for one in modules if one["verdict"] == "pass"} >= {*ENCODERS, DENOISER, VAE_DECODER}


def test_a_reference_file_holds_steps_with_different_numbers_of_rows(proven, bundle: Path, capsys) -> None:
    reference, _ = proven
    assert main(["parity", str(bundle), "--reference", str(reference), "--threads", "1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["levels"]
    levels = {"stage", "step", "trajectory", "picture"}
    assert {r["level"] for r in results if r["verdict"] == "pass"} >= levels
    unchecked = {r["metric"] for r in results if r["level"] in levels and r["verdict"] == "not checked"}
    assert unchecked <= {"LPIPS"}


@dataclass(frozen=True)
class Defect:
    """What is planted in one place, and where it must be found."""

    plant: Callable[[TorchModel], object]
    level: Level
    stage: str
    module: str | None = None
    cause: str = ""


def _pad_the_second_clip_with_its_end(model: TorchModel) -> None:
    old = model.pipeline
    encoders = list(old.conditioning.encoders)
    encoders[1] = replace(encoders[1], spec=replace(encoders[1].spec, pad_token_id=517))
    conditioning = Conditioning(encoders, old.conditioning.conditioner, key="planted")
    model.pipeline = Pipeline(old.manifest, old.sessions, conditioning)


def _last_states(model: TorchModel) -> None:
    encoder = module_of(model, "text_encoder_2")

    def forward(self, input_ids):  # type: ignore[no-untyped-def]
        _, pooled = type(self).forward(self, input_ids)
        return self.text_model(input_ids).last_hidden_state, pooled

    patch_forward(encoder, forward)


def _swap_pooled(model: TorchModel) -> None:
    def forward(self, states, pooled, states_2, pooled_2, states_3):  # type: ignore[no-untyped-def]
        joint, _ = type(self).forward(self, states, pooled, states_2, pooled_2, states_3)
        return joint, torch.cat([pooled_2, pooled], dim=1)

    patch_forward(module_of(model, CONDITIONER), forward)


def _shift_once(model: TorchModel) -> None:
    old = model.pipeline
    scheduler = replace(old.manifest.scheduler, sigma_min=0.001)
    model.pipeline = Pipeline(replace(old.manifest, scheduler=scheduler), old.sessions, old.conditioning)


def _crop_one_lower(model: TorchModel) -> None:
    embedding = module_of(model, DENOISER, "network.pos_embed")
    before = embedding._crop_start
    embedding._crop_start = lambda side: before(side) + 1


def _no_vae_shift(model: TorchModel) -> None:
    module_of(model, VAE_DECODER).shift_factor = 0.0


DEFECTS = {
    "token ids": Defect(_pad_the_second_clip_with_its_end, Level.GRAPH, "tokenizer"),
    "text embeds: the last states, not the penultimate": Defect(_last_states, Level.STAGE, "text_encoder_2"),
    "pooled: CLIP-G before CLIP-L": Defect(_swap_pooled, Level.STAGE, CONDITIONER),
    "sigmas: shifted once": Defect(_shift_once, Level.GRAPH, "scheduler"),
    "position embedding: one row off": Defect(_crop_one_lower, Level.STAGE, DENOISER, "network.pos_embed"),
    "VAE shift missing": Defect(_no_vae_shift, Level.STAGE, VAE_DECODER),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found_in_its_place(name, sd3_checkpoint) -> None:
    defect = DEFECTS[name]
    context = context_of(sd3_checkpoint, torch_candidate(sd3_checkpoint, defect.plant))
    found = failures(context, defect.level)
    assert found, f"{name} passes"
    assert found[0].stage == defect.stage
    if defect.module is not None:
        assert found[0].culprit is not None
        assert found[0].culprit.module == defect.module, str(found[0].culprit)


@pytest.mark.parametrize("level", [Level.GRAPH, Level.STAGE, Level.STEP])
def test_without_a_defect_nothing_is_found(level, sd3_checkpoint) -> None:
    context = context_of(sd3_checkpoint, torch_candidate(sd3_checkpoint))
    results = list(LEVELS[level](context))
    assert [result for result in results if result.verdict is Verdict.PASS]
    assert not [result for result in results if result.verdict is Verdict.FAIL]


def test_a_wrong_guidance_window_is_named_by_the_guidance_weights(sd3_checkpoint) -> None:
    """The third row runs outside its window: the denoiser's feeds differ, but the denoiser is right."""

    def plant(model: TorchModel) -> None:
        defaults = model.pipeline.manifest.defaults
        skip = replace(defaults.skip_layer_guidance, stop=1.1)
        manifest = replace(model.pipeline.manifest, defaults=replace(defaults, skip_layer_guidance=skip))
        model.pipeline = Pipeline(manifest, model.pipeline.sessions, model.pipeline.conditioning)

    settings = replace(SETTINGS, num_inference_steps=5)
    context = context_of(sd3_checkpoint, torch_candidate(sd3_checkpoint, plant), settings)
    found = failures(context, Level.STEP)
    assert found[0].stage == "pipeline"
    assert any("guidance_weights" in cause or "(3" in cause for cause in found[0].causes), found[0].causes
