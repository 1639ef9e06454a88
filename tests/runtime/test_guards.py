"""NaN and blank pictures are errors that name their stage and step."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from ditc.runtime import denoise
from ditc.runtime.errors import NumericsError
from ditc.runtime.guard import check_stats
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import Array, ComputeDevice, Session, Tensor
from ditc.runtime.spec import CONDITIONER, DENOISER, TEXT_ENCODER, VAE_DECODER, StageSpec


class Broken:
    """A real session whose outputs are changed before they are returned, as by a failing kernel."""

    def __init__(self, session: Session, spoil: object) -> None:
        self.session, self.spoil, self.runs = session, spoil, 0

    @property
    def spec(self) -> StageSpec:
        return self.session.spec

    @property
    def device(self) -> ComputeDevice:
        return self.session.device

    def run(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        self.runs += 1
        return self.spoil(self.session.run(feeds), self.runs)  # type: ignore[operator]

    def close(self) -> None:
        pass


def _with(pipeline: Pipeline, stage: str, spoil: object) -> Pipeline:
    return pipeline.with_sessions({stage: Broken(pipeline.sessions[stage], spoil)})


def test_nan_in_the_loop_is_reported_with_stage_and_step(pipeline: Pipeline) -> None:
    def nan_latents_after_two(
        _: object, index: int, __: float, tensors: dict[str, Array]
    ) -> dict[str, Array]:
        return {"latents": np.full_like(tensors["latents"], np.nan)} if index == 1 else {}

    with pytest.raises(NumericsError, match="denoiser: step 3 of 4") as caught:
        pipeline("cat", num_inference_steps=4, callback_on_step_end=nan_latents_after_two)
    assert caught.value.hint is not None


def test_nan_in_the_decoder_is_reported_with_its_stage(pipeline: Pipeline) -> None:
    def spoil(outputs: dict[str, Array], _: int) -> dict[str, Array]:
        return {
            name: np.where(np.arange(value.shape[-1]) == 3, np.inf, value) for name, value in outputs.items()
        }

    with pytest.raises(NumericsError, match=VAE_DECODER):
        _with(pipeline, VAE_DECODER, spoil)("cat", num_inference_steps=1)


def test_nan_in_text_embeddings_is_reported_with_its_stage(pipeline: Pipeline) -> None:
    embeds = np.full((1, 12, 24), np.nan, np.float32)
    with pytest.raises(NumericsError, match=CONDITIONER):
        pipeline(
            prompt_embeds=embeds, prompt_attention_mask=np.ones((1, 12), np.int64), num_inference_steps=1
        )
    assert TEXT_ENCODER in pipeline.sessions


def test_a_picture_of_one_colour_is_an_error_unless_allowed(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    def grey(outputs: dict[str, Array], _: int) -> dict[str, Array]:
        return {name: np.full_like(value, 0.25) for name, value in outputs.items()}

    broken = _with(pipeline, VAE_DECODER, grey)
    with pytest.raises(NumericsError, match="picture 0 has one colour"):
        broken("cat", num_inference_steps=1)
    with caplog.at_level(logging.WARNING):
        output = broken("cat", num_inference_steps=1, allow_uniform=True)
    assert len(output.images) == 1 and "picture 0 has one colour" in caplog.text


def test_nan_in_one_sample_leaves_the_others_bit_equal(pipeline: Pipeline) -> None:
    request = Request(prompt=["cat", "dog", "red heart"], seed=1, num_inference_steps=3, height=32, width=32)
    (good,) = pipeline.start(pipeline.plan(request))
    spoiled = np.asarray(good.latents).copy()
    spoiled[1] = np.nan
    bad = replace(good, latents=spoiled)
    while not good.done:
        (good,) = denoise.step(pipeline.sessions[DENOISER], [good])
        (bad,) = denoise.step(pipeline.sessions[DENOISER], [bad])
    np.testing.assert_array_equal(bad.latents[[0, 2]], good.latents[[0, 2]])  # type: ignore[index]
    stats = np.asarray(bad.stats)
    assert stats[1, 0] > 0 and stats[0, 0] == stats[2, 0] == 0
    with pytest.raises(NumericsError, match="sample 1"):
        check_stats(bad, DENOISER)
