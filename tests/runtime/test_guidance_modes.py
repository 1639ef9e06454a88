"""The guidance mode of a bundle, from the manifest to the picture: embedded in the network, or none at all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditc.export.graph.step import wrap
from ditc.export.graph.torch_session import TorchSession
from ditc.runtime.errors import UsageError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.spec import DENOISER, StageSpec
from ditc.runtime.step_contract import GUIDANCE, ROWS, GuidanceMode, StepContract


class Distilled(nn.Module):
    """A network whose prediction depends on the embedded guidance, and which records its numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, latents: Tensor, timestep: Tensor, *rest: Tensor) -> Tensor:
        self.rows.append(len(latents))
        guidance = rest[0] if rest[0].dim() == 1 else torch.ones_like(timestep)
        return latents * guidance[:, None, None, None] / 10


@pytest.fixture
def distilled(pipeline: Pipeline) -> Callable[[GuidanceMode], tuple[Pipeline, Distilled]]:
    """The tiny bundle's pipeline around a distilled network."""

    def make(mode: GuidanceMode) -> tuple[Pipeline, Distilled]:
        spec, network = pipeline.sessions[DENOISER].spec, Distilled()
        contract = StepContract(guidance=mode)
        conditioning = tuple(t for t in spec.inputs if t.shape[0] == ROWS and len(t.shape) > 1)
        channels = pipeline.manifest.latents.channels
        stage = StageSpec(
            DENOISER, contract.inputs(channels, conditioning), contract.outputs(channels), spec.profile
        )
        session = TorchSession(wrap(network, dtype=torch.float32, contract=contract), stage)
        sessions = {**pipeline.sessions, DENOISER: session}
        manifest = replace(pipeline.manifest, guidance=mode)
        return Pipeline(manifest, sessions, pipeline.conditioning), network

    return make


def draw(pipeline: Pipeline, **arguments: Any) -> np.ndarray:
    settings = {"seed": 3, "num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    return np.asarray(pipeline.draw(Request(prompt=["red cat", "dog"], **{**settings, **arguments})).images)


def test_an_embedded_guidance_scale_changes_the_picture_and_needs_one_row_per_sample(
    distilled: Callable[..., tuple[Pipeline, Distilled]],
) -> None:
    pipeline, network = distilled(GuidanceMode.EMBEDDED)
    one, other = draw(pipeline, guidance_scale=4.5), draw(pipeline, guidance_scale=1.0)
    assert set(network.rows) == {2}
    assert not np.array_equal(one, other)
    (state,) = pipeline.start(pipeline.plan(Request(prompt="cat", guidance_scale=4.5)))
    assert state.schedule[0][GUIDANCE].tolist() == [4.5]


def test_a_negative_prompt_that_is_not_used_gives_a_warning_and_changes_nothing(
    distilled: Callable[..., tuple[Pipeline, Distilled]], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, _ = distilled(GuidanceMode.EMBEDDED)
    plain = draw(pipeline)
    assert "negative" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(draw(pipeline, negative_prompt="blurry"), plain)
    assert "negative prompts have no effect" in caplog.text


def test_a_guidance_scale_that_is_not_used_is_refused(
    distilled: Callable[..., tuple[Pipeline, Distilled]],
) -> None:
    pipeline, network = distilled(GuidanceMode.NONE)
    with pytest.raises(UsageError, match=r"guidance_scale is 4\.5, but .* takes no guidance"):
        draw(pipeline, guidance_scale=4.5)
    assert network.rows == []
    assert np.array_equal(draw(pipeline), draw(pipeline, guidance_scale=1.0))
    assert set(network.rows) == {2}
