"""Engine sessions on a fake GPU draw the same pictures as ONNX Runtime, and refuse inputs that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_pipeline import SETTINGS, Gpu
from fake_gpu import FakeCuda, FakeEngine

from ditc.runtime import denoise
from ditc.runtime.bundle.manifest import Tiling, load_manifest
from ditc.runtime.errors import SessionError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.tensorrt import TensorRTSession
from ditc.runtime.spec import DENOISER, VAE_DECODER


def test_several_pictures_and_batches_beyond_the_profile_are_the_same(gpu: Gpu, expected: Any) -> None:
    for count in (2, 6):
        changes = {"num_images_per_prompt": count, "num_inference_steps": 2}
        assert np.array_equal(gpu.draw(**changes), expected(**changes))


def test_tiles_are_decoded_through_an_engine_too(gpu: Gpu, pipeline: Pipeline, expected: Any) -> None:
    gpu.pipeline.tiling, before = Tiling(tile=48, stride=32), pipeline.tiling
    pipeline.tiling = gpu.pipeline.tiling
    try:
        assert np.array_equal(gpu.draw(), expected())
    finally:
        pipeline.tiling = before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda feeds: feeds.pop("timestep"), "denoiser: lacks timestep"),
        (lambda feeds: feeds.update(other=feeds["timestep"]), "denoiser: does not take other"),
        (lambda feeds: feeds.update(timestep=feeds["timestep"].astype(np.float64)), "timestep is float64"),
        (
            lambda feeds: feeds.update(timestep=np.zeros(2, np.float32)),
            "batch is 1 in latents and 2 in timestep, but must be the same",
        ),
        (lambda feeds: feeds.update(timestep=np.zeros((1, 1), np.float32)), r"timestep is \(1, 1\)"),
        (
            lambda feeds: feeds.update(latents=np.zeros((1, 8, 900, 2), np.float32)),
            "height of latents is 900",
        ),
    ],
)
def test_a_wrong_feed_is_refused_before_anything_is_copied(gpu: Gpu, change: Any, message: str) -> None:
    (state,) = gpu.pipeline.start(gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    feeds: dict[str, Any] = {
        "latents": state.latents,
        "history": state.history,
        "row_of": state.rows.row_of,
        **state.rows.conditioning,
        **state.schedule[0],
    }
    gpu.cuda.calls.clear()
    change(feeds)
    with pytest.raises(SessionError, match=message):
        gpu.denoiser.run(feeds)
    assert not gpu.cuda.calls


def test_the_error_of_an_engine_that_does_not_run_has_the_librarys_message(tiny_bundle: Path) -> None:
    gpu = Gpu(tiny_bundle)
    (state,) = gpu.pipeline.start(gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    gpu.engines[DENOISER].refuse_address = "timestep"
    for run in (lambda: denoise.step(gpu.denoiser, [state]), lambda: denoise.advance(gpu.denoiser, state, 5)):
        with pytest.raises(SessionError, match="denoiser: the engine refuses timestep: no message"):
            run()
    gpu.engines[DENOISER].refuse_address = ""
    gpu.engines[DENOISER].fail = True
    with pytest.raises(SessionError, match="denoiser: tensorrt did not run: the fake was told to fail"):
        denoise.step(gpu.denoiser, [state])
    with pytest.raises(
        SessionError, match="denoiser: the engine refused step 0 of 5: the fake was told to fail"
    ):
        denoise.advance(gpu.denoiser, state, 5)
    gpu.pipeline.close()


def test_an_engine_with_other_names_than_promised_is_refused(tiny_bundle: Path) -> None:
    artifact = load_manifest(tiny_bundle).stages[VAE_DECODER].artifacts[0]
    cuda = FakeCuda()
    engine = FakeEngine(cuda, tiny_bundle / artifact.file.path, artifact.spec)
    renamed = replace(artifact.spec, inputs=(replace(artifact.spec.inputs[0], name="z"),))
    with pytest.raises(
        SessionError, match="the engine and the manifest differ in latents float32, z float32"
    ):
        TensorRTSession(engine, renamed, Device(cuda))


def test_a_profile_for_each_orientation_is_chosen_by_size(tiny_bundle: Path, expected: Any) -> None:
    artifact = load_manifest(tiny_bundle).stages[DENOISER].artifacts[0]
    tall, wide = artifact.spec.profile["height"], artifact.spec.profile["width"]
    split = tall.max // 2
    ranges = (
        {"height": replace(tall, max=split)},
        {"height": replace(tall, min=split + 1, opt=tall.max), "width": wide},
    )
    gpu = Gpu(tiny_bundle)
    session = TensorRTSession(replace(gpu.engines[DENOISER], ranges=ranges), artifact.spec, gpu.device)
    gpu.pipeline.sessions[DENOISER] = session
    for cells in (split, tall.max):
        scale = gpu.pipeline.manifest.latents.scale_factor
        size = {"height": cells * scale, "width": wide.min * scale, "num_inference_steps": 2}
        assert np.array_equal(gpu.draw(**size), expected(**size))
    assert set(session._contexts) == {0, 1}
    session.close()
