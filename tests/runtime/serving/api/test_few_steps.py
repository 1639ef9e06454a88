"""A few-step bundle behind the API: its own defaults and settings, and no negative prompt."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving_thread import Answer, ServerThread, server_thread

from ditc.runtime.load_options import LoadOptions
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission, Bounds


@pytest.fixture(scope="module")
def server(sprint_bundle: Path) -> Iterator[ServerThread]:
    models = Models(
        {"sprint": sprint_bundle},
        admission=Admission(Bounds()),
        load=LoadOptions(threads=1),
        warm_up_seconds=0.0,
    )
    models.open("sprint")
    with server_thread(models=models) as running:
        yield running
    models.close()


def post(server: ServerThread, path: str = "/v1/images/generations", **body: Any) -> Answer:
    content = json.dumps(body).encode()
    return server.ask("POST", path, content, {"Content-Type": "application/json"})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_inference_steps": 4, "guidance_scale": 2.0},
        {"max_timesteps": 1.5, "intermediate_timesteps": False},
        {"timesteps": [1.5, 0.8, 0.0]},
    ],
)
def test_the_picture_is_that_of_the_pipeline(
    server: ServerThread, sprint_bundle: Path, settings: dict[str, Any]
) -> None:
    answer = post(server, prompt="red cat", seed=4, size="32x32", **settings)
    assert answer.status == 200, answer.body
    (picture,) = json.loads(answer.body)["data"]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))))
    with Pipeline.load(sprint_bundle, threads=1) as pipeline:
        expected = pipeline("red cat", seed=4, height=32, width=32, **settings).images[0]
    assert np.array_equal(drawn, np.asarray(expected))


def test_a_negative_prompt_is_refused_by_name(server: ServerThread) -> None:
    error = post(server, prompt="cat", negative_prompt="grey").error
    assert (error["param"], error["code"]) == ("negative_prompt", "unsupported_value")
    body = {"inputs": "cat", "parameters": {"negative_prompt": "grey"}}
    assert "negative_prompt" in post(server, "/hf/models/sprint", **body).body.decode()
    assert "negative_prompt" not in server.ask("GET", "/v1/models").body.decode()


def test_a_setting_of_another_number_of_steps_is_refused_by_name(server: ServerThread) -> None:
    error = post(server, prompt="cat", num_inference_steps=4, intermediate_timesteps=1.3).error
    assert error["param"] == "intermediate_timesteps" and "only a schedule of 2 steps" in error["message"]
