"""The scheduler over OpenVINO: requests that share steps and leave at different times get their own pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from serving_scheduler import SETTINGS, Serve

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request


def test_two_requests_of_different_steps_get_the_pictures_of_the_pipeline(
    serve: Serve, openvino_bundle: Path
) -> None:
    server = serve(
        reopen=lambda: Pipeline.load(openvino_bundle, backend="openvino", threads=1),
        batches_pay=True,
        start=False,
    )
    asked = [
        {"seed": 1, "num_inference_steps": 2},
        {"seed": 2, "num_inference_steps": 4, "prompt": "blue dog"},
    ]
    heard = [server.submit(**one)[1] for one in asked]
    server.scheduler.start()
    for one, ears in zip(asked, heard, strict=True):
        (picture,) = ears.wait().images
        request = Request(**{"prompt": "red cat", **SETTINGS, **one})
        (alone,) = server.scheduler.pipeline.draw(request).images
        # In a batch, products are summed in another order, so a value may be rounded to the next of 256.
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(alone)).max() <= 1
