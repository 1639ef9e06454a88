"""Parity of SANA-Sprint: it passes at all levels against diffusers, and defects of few-step sampling are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import (
    SETTINGS,
    context_of,
    failures,
    module_of,
    patch_pipeline,
    torch_candidate,
)

from ditc.parity.levels import LEVELS
from ditc.parity.reference.pytorch import TorchModel
from ditc.parity.results import Verdict
from ditc.runtime.cli import main
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.spec import DENOISER
from ditc.runtime.state import DenoiseState
from ditc.runtime.step_contract import GUIDANCE, NOISE
from ditc.runtime.tolerances import Level

FOUR = replace(SETTINGS, num_inference_steps=4, guidance_scale=4.5)  # the last step adds no noise
ONE_CASE = ["--seeds", "0", "--threads", "1"]


def test_a_bundle_passes_at_every_level_and_against_a_saved_reference(
    sprint_bundle: Path, sprint_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, saved = (
        Path(shutil.copytree(sprint_bundle, tmp_path / "bundle")),
        tmp_path / "reference.safetensors",
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")
    case = [*ONE_CASE, "--prompts", str(prompts)]
    run = ["parity", str(bundle), "--against"]
    assert main([*run, str(sprint_checkpoint), *case, "--save-reference", str(saved)]) == 0
    (entry,) = json.loads((bundle / "certificate.json").read_text())["entries"]
    names = {line["name"] for line in entry["parity"]["lines"] if line["passed"]}
    assert names >= {level.value for level in LEVELS}
    assert (
        main([*run, str(sprint_checkpoint), *case, "--steps", "1", "--level", "module", "--level", "graph"])
        == 0
    )
    assert main(["parity", str(bundle), "--reference", str(saved), "--threads", "1"]) == 0
    assert "PASS" in capsys.readouterr().out


class ReusedNoise(Pipeline):
    """A pipeline that feeds the noise of the first step to all steps."""

    def states(self, plan: Any) -> Iterator[DenoiseState]:
        for state in super().states(plan):
            first = {NOISE: state.schedule[0][NOISE]}
            yield replace(state, schedule=tuple({**step, **first} for step in state.schedule))


class StrongerEmbedding(Pipeline):
    """A pipeline that feeds ten times the guidance scale."""

    def states(self, plan: Any) -> Iterator[DenoiseState]:
        for state in super().states(plan):
            scaled = ({**step, GUIDANCE: step[GUIDANCE] * np.float32(10)} for step in state.schedule)
            yield replace(state, schedule=tuple(scaled))


def pipeline_defect(kind: type[Pipeline]) -> Callable[[TorchModel], object]:
    return lambda model: patch_pipeline(model, kind)


@pytest.mark.parametrize(
    ("kind", "level", "cause"),
    [
        (ReusedNoise, Level.STEP, "noise reused between steps"),
        (ReusedNoise, Level.TRAJECTORY, "noise reused between steps"),
        (StrongerEmbedding, Level.STEP, "the embedded guidance scale is 45, but 4.5 was requested"),
        (StrongerEmbedding, Level.TRAJECTORY, "the embedded guidance scale is 45"),
    ],
)
def test_a_defect_of_what_is_fed_is_caught_and_named(
    sprint_checkpoint: Path, kind: type[Pipeline], level: Level, cause: str
) -> None:
    healthy = context_of(sprint_checkpoint, torch_candidate(sprint_checkpoint), FOUR)
    assert not failures(healthy, level)
    found = failures(
        context_of(sprint_checkpoint, torch_candidate(sprint_checkpoint, pipeline_defect(kind)), FOUR), level
    )
    assert found and any(cause in one for one in found[0].causes), found
    assert found[0].stage == "pipeline" and found[0].culprit is not None
    if (kind, level) == (ReusedNoise, Level.TRAJECTORY):
        assert found[0].culprit.module == "step 2"


def test_a_guidance_embedding_that_is_off_by_ten_is_caught_and_named(sprint_checkpoint: Path) -> None:
    def forget_scale(model: TorchModel) -> None:
        module_of(model, DENOISER, "network.time_embed").guidance_embeds_scale = 1.0

    context = context_of(sprint_checkpoint, torch_candidate(sprint_checkpoint, forget_scale), FOUR)
    (found,) = failures(context, Level.STAGE)[:1]
    assert found.stage == DENOISER and found.culprit is not None
    assert found.culprit.module == "network.time_embed", found.culprit
    assert "input of network.time_embed.guidance_embedder" in found.culprit.between[1]
    assert failures(context, Level.STEP)


def test_a_mistake_of_both_sides_is_caught_by_diffusers(sprint_checkpoint: Path) -> None:
    def forget_scale(model: TorchModel) -> None:
        module_of(model, DENOISER, "network.time_embed").guidance_embeds_scale = 1.0

    context = context_of(
        sprint_checkpoint, torch_candidate(sprint_checkpoint, forget_scale), FOUR, with_upstream=True
    )
    forget_scale(context.reference)
    found = [result for result in LEVELS[Level.TRAJECTORY](context) if result.verdict is Verdict.FAIL]
    assert {result.against for result in found} == {"diffusers"}
