"""Parity of image-to-video: it passes against upstream, and planted defects are caught and named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import context_of, failures, module_of, patch_forward, patch_pipeline, torch_candidate

from ditc.export.families.sana.video_network import SanaVideoDenoiser
from ditc.parity.cases import Case, Settings, edit_cases
from ditc.parity.levels import LEVELS
from ditc.parity.levels.step import OTHER_TIMESTEP
from ditc.parity.levels.trajectory import OTHER_START
from ditc.parity.reference.pytorch import TorchModel
from ditc.parity.results import Verdict
from ditc.runtime import image_states
from ditc.runtime.image_start import ImageLatents
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import to_numpy
from ditc.runtime.spec import DENOISER
from ditc.runtime.state import DenoiseState
from ditc.runtime.step_contract import HELD
from ditc.runtime.tolerances import Level

TEXT = Case("a red heart", 0)
SETTINGS = Settings(
    cases=edit_cases((TEXT,), videos=True), num_inference_steps=2, guidance_scale=3.0, height=32, width=64
)
NOT_HELD = "the first frame is not held"


@pytest.fixture(scope="module")
def picture_checkpoint(video_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint, whose model_index.json names the pipeline that starts from a picture."""
    copy = tmp_path_factory.mktemp("checkpoint")
    for part in video_checkpoint.iterdir():
        if part.name != "model_index.json":
            (copy / part.name).symlink_to(part)
    index = json.loads((video_checkpoint / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "SanaImageToVideoPipeline"}))
    return copy


@pytest.mark.parametrize("checkpoint", ["video_checkpoint", "picture_checkpoint"])
def test_videos_with_and_without_a_picture_agree_with_upstream(
    checkpoint: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(checkpoint)
    both = replace(SETTINGS, cases=(TEXT, *SETTINGS.cases))
    context = context_of(path, torch_candidate(path), both, with_upstream=True)
    for level in (Level.STEP, Level.TRAJECTORY, Level.PICTURE):
        results = list(LEVELS[level](context))
        assert not [result for result in results if result.verdict is Verdict.FAIL]
        passed = [result for result in results if result.verdict is Verdict.PASS]
        assert any("image-to-video" in result.what for result in passed)
        if level is not Level.STEP:
            assert {result.against for result in passed} >= {"diffusers"}


class HoldsNothing(Pipeline):
    """A pipeline that puts the picture into the first frame, and then lets the loop change it."""

    def states(self, plan: Any) -> Iterator[DenoiseState]:
        for state in super().states(plan):
            free = [{**step, HELD: np.zeros_like(step[HELD])} for step in state.schedule]
            yield replace(state, schedule=tuple(free))


class OtherPicture(Pipeline):
    """A pipeline that holds another picture than it should."""

    def states(self, plan: Any) -> Iterator[DenoiseState]:
        for state in super().states(plan):
            latents = to_numpy(state.latents).copy()
            latents[:, :, 0] *= -1
            yield replace(state, latents=latents)


def _one_timestep(self: Any, latents: torch.Tensor, t: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """SanaVideoDenoiser.forward, whose held frame has the timestep of the others."""
    out: torch.Tensor = _forward(self, latents, t.amax(dim=1, keepdim=True).expand_as(t), *rest)
    return out


_forward = SanaVideoDenoiser.forward


def _ignores_held(model: TorchModel) -> None:
    """A step that takes `held` and does nothing with it."""
    module = module_of(model, DENOISER)
    index = [tensor.name for tensor in model.plan.stages[DENOISER].spec.inputs].index(HELD)

    def forward(self: Any, *inputs: torch.Tensor) -> Any:
        free = torch.zeros_like(inputs[index])
        return type(self).forward(self, *inputs[:index], free, *inputs[index + 1 :])

    patch_forward(module, forward)


DEFECTS = {
    "pipeline": (lambda model: patch_pipeline(model, HoldsNothing), "pipeline", [NOT_HELD]),
    "graph": (_ignores_held, DENOISER, [NOT_HELD]),
    "timestep": (
        lambda model: patch_forward(module_of(model, DENOISER, "network"), _one_timestep),
        DENOISER,
        [OTHER_TIMESTEP],
    ),
}


@pytest.mark.parametrize("level", [Level.STEP, Level.TRAJECTORY])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught_and_named(video_checkpoint: Path, defect: str, level: Level) -> None:
    plant, stage, causes = DEFECTS[defect]
    candidate = torch_candidate(video_checkpoint, plant)
    found = failures(context_of(video_checkpoint, candidate, SETTINGS, with_upstream=True), level)
    assert found
    for result in found:
        assert result.stage == stage, result
        assert all(cause in " ".join(result.causes) for cause in causes), result
    if defect == "graph" and level is Level.STEP:
        assert OTHER_TIMESTEP in found[0].causes  # that of a step that ignores `held` is wrong too


def test_another_picture_is_caught_and_named(video_checkpoint: Path) -> None:
    candidate = torch_candidate(video_checkpoint, lambda model: patch_pipeline(model, OtherPicture))
    found = failures(context_of(video_checkpoint, candidate, SETTINGS, with_upstream=True), Level.TRAJECTORY)
    assert found and all(OTHER_START in result.causes for result in found)


def test_a_mistake_that_both_sides_have_is_caught_by_upstream_and_named(
    video_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle and its PyTorch reference share the runtime and the step around the network."""
    for owner, name, wrong, cause in (
        (
            image_states,
            "first_frame_held",
            lambda shape: np.zeros((shape[0], shape[2]), np.float32),
            NOT_HELD,
        ),
        (SanaVideoDenoiser, "forward", _one_timestep, OTHER_TIMESTEP),
        (ImageLatents, "take", _halved(ImageLatents.take), OTHER_START),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrong)
            context = context_of(
                video_checkpoint, torch_candidate(video_checkpoint), SETTINGS, with_upstream=True
            )
            found = failures(context, Level.TRAJECTORY)
        assert found and {result.against for result in found} == {"diffusers"}, name
        assert all(cause in " ".join(result.causes) for result in found), (name, found)


def _halved(take: Any) -> Any:
    return lambda self, count: take(self, count) / 2
