"""NaN and blank pictures are named with their stage and step, and the other pictures are drawn."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import numpy as np
import pytest

from ditc.runtime import denoise
from ditc.runtime.batch import Batch
from ditc.runtime.errors import NumericsError
from ditc.runtime.guard import Guard, spoiled_samples
from ditc.runtime.output import Output
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import Array, ComputeDevice, Session, Tensor
from ditc.runtime.spec import CONDITIONER, DENOISER, TEXT_ENCODER, VAE_DECODER, StageSpec
from ditc.runtime.state import DenoiseState


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
    def spoil(outputs: dict[str, Array], _: int) -> dict[str, Array]:
        return {name: np.full_like(value, np.nan) for name, value in outputs.items()}

    with pytest.raises(NumericsError, match=CONDITIONER):
        _with(pipeline, CONDITIONER, spoil)("cat", num_inference_steps=1)


def test_a_picture_of_one_colour_is_an_error_unless_allowed(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    def grey(outputs: dict[str, Array], _: int) -> dict[str, Array]:
        return {name: np.full_like(value, 0.25) for name, value in outputs.items()}

    broken = _with(pipeline, VAE_DECODER, grey)
    with pytest.raises(NumericsError, match="vae_decoder: the picture has one colour only"):
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
    assert [failure.index for failure in spoiled_samples(bad, DENOISER)] == [1]


# One bad picture among several

SIX = ["cat", "dog", "red heart", "blue cat", "a photo", "apple"]  # more than the four that fit into one run
SMALL = {"num_inference_steps": 3, "height": 32, "width": 32, "seed": 1}


def _nan_in(chunk_sample: int, at: int) -> object:
    """A callback that puts NaN into one sample of the latents when it is called for the `at`-th time."""
    calls = iter(range(100))

    def callback(_: object, __: int, ___: float, tensors: dict[str, Array]) -> dict[str, Array]:
        latents = np.array(tensors["latents"])
        if next(calls) == at:
            latents[chunk_sample] = np.nan
        return {"latents": latents}

    return callback


def _spoil_run(number: int, value: float) -> object:
    def spoil(outputs: dict[str, Array], run: int) -> dict[str, Array]:
        return {n: np.full_like(t, value) for n, t in outputs.items()} if run == number else outputs

    return spoil


def _draw_six(pipeline: Pipeline, kind: str, **more: object) -> Output:
    arguments = {**SMALL, "output_type": "np", **more}
    if kind == "first chunk":
        return pipeline(SIX, callback_on_step_end=_nan_in(2, 0), **arguments)
    if kind == "second chunk":
        return pipeline(SIX, callback_on_step_end=_nan_in(1, 3), **arguments)
    stage, value = {"decoder": (VAE_DECODER, np.nan), "colour": (VAE_DECODER, 0.25)}.get(
        kind, (TEXT_ENCODER, np.nan)
    )
    return _with(pipeline, stage, _spoil_run(3, value))(SIX, **arguments)


@pytest.mark.parametrize(
    ("kind", "lost", "step", "reason"),
    [
        ("first chunk", 2, 2, "denoiser: step 2 of 3 left"),
        ("second chunk", 5, 2, "denoiser: step 2 of 3 left"),
        ("decoder", 2, None, "vae_decoder: the picture has NaN or Inf"),
        ("colour", 2, None, "vae_decoder: the picture has one colour only"),
        ("text", 2, None, "text_encoder: .* has NaN or Inf for this text"),
    ],
)
def test_one_bad_picture_is_named_and_the_five_others_are_drawn(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture, kind: str, lost: int, step: int | None, reason: str
) -> None:
    output = _draw_six(pipeline, kind)
    (failure,) = output.failures
    assert (failure.index, failure.prompt, failure.step) == (lost, SIX[lost], step)
    assert re.match(reason, failure.reason) and failure.hint
    assert f"picture {lost} ({SIX[lost]!r}): " in caplog.text
    others = [index for index in range(6) if index != lost]
    clean = pipeline(SIX, **SMALL, output_type="np").images
    np.testing.assert_array_equal(output.images[others], clean[others])
    assert np.isnan(output.images[lost]).all()
    with pytest.raises(NumericsError, match=rf"1 of 6 pictures failed; picture {lost} \({SIX[lost]!r}\): "):
        _draw_six(pipeline, kind, strict=True)


def test_the_place_of_a_failed_picture_is_none_among_pil_images(pipeline: Pipeline) -> None:
    output = _draw_six(pipeline, "colour", output_type="pil")
    assert [image is None for image in output.images] == [False, False, True, False, False, False]
    latents = _draw_six(pipeline, "text", output_type="latent").images
    assert (
        latents.shape[0] == 6 and np.isnan(latents[2]).all() and np.isfinite(latents[[0, 1, 3, 4, 5]]).all()
    )


def test_steps_go_on_for_the_good_pictures_and_end_when_none_is_left(pipeline: Pipeline) -> None:
    request = Request(prompt=["cat", "dog"], **SMALL)
    (state,) = pipeline.start(pipeline.plan(request))
    latents = np.array(state.latents)
    latents[0] = np.nan
    *_, last = pipeline.run([replace(state, latents=latents)], request=request)
    assert last.state.done and [failure.step for failure in last.state.failures] == [1]
    latents[1] = np.nan
    with pytest.raises(
        NumericsError, match=r"2 of 2 pictures failed; picture 0 \('cat'\): denoiser: step 1 of 3"
    ):
        next(pipeline.run([replace(state, latents=latents)], request=request))


def test_nan_of_one_request_does_not_end_or_change_the_others_of_its_batch(pipeline: Pipeline) -> None:
    """As a server steps them: one request joins, one overflows and leaves, one stays."""

    def serve(spoil: bool) -> tuple[list[DenoiseState], DenoiseState]:
        batch = Batch(pipeline.sessions[DENOISER])
        requests = [Request(prompt=text, **{**SMALL, "seed": i}) for i, text in enumerate(SIX[:3])]
        stays, breaks, joins = (pipeline.start(pipeline.plan(request))[0] for request in requests)
        guards = {0: Guard(DENOISER), 1: Guard(DENOISER)}
        stays, breaks = batch.step([stays, breaks])
        if spoil:
            breaks = replace(breaks, latents=np.full_like(breaks.latents, np.nan))
        stays, breaks, joins = batch.step([stays, breaks, joins])
        stays, breaks = guards[0].watch(stays), guards[1].watch(breaks)
        return list(batch.step([stays, joins])), breaks

    served, broken = serve(spoil=True)
    undisturbed, whole = serve(spoil=False)
    assert broken.lost and broken.failures[0].step == 2 and not whole.failures
    for state, alone in zip(served, undisturbed, strict=True):
        assert not state.failures
        np.testing.assert_array_equal(state.latents, alone.latents)
