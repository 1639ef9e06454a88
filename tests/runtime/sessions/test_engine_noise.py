"""The loop of a few-step bundle on a fake GPU: the noise of all steps is fed at once, and x0 is decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_pipeline import Gpu

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request

SETTINGS = {"height": 32, "width": 64, "output_type": "np"}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_captured_loop_with_noise_draws_the_picture_of_single_steps(
    sprint_bundle: Path, steps: int
) -> None:
    gpu, drawn = Gpu(sprint_bundle), []
    requests = [
        Request(prompt=["red cat", "dog"], num_inference_steps=steps, seed=seed, **SETTINGS)
        for seed in range(3)
    ]
    for request in requests:  # plain, then captured, then the same graph with other noise
        drawn.append(np.asarray(gpu.pipeline.draw(request).images))
    assert gpu.cuda.calls.count("launch") == (2 if steps > 1 else 0)
    assert gpu.cuda.calls.count("begin_capture") == (1 if steps > 1 else 0)
    gpu.pipeline.close()
    with Pipeline.load(sprint_bundle, threads=1) as pipeline:
        for request, images in zip(requests, drawn, strict=True):
            assert np.array_equal(images, pipeline.draw(request).images)
