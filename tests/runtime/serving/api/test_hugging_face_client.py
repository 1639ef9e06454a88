"""The official Hugging Face client, unmodified, against a real server process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import BadRequestError, HfHubHTTPError
from serving_process import ServerProcess

from ditc.runtime.pipeline import Pipeline

ASKED: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "seed": 7,
}


@pytest.fixture(scope="module")
def url(api_server: ServerProcess, tiny_bundle: Path) -> str:
    return f"{api_server.url}/hf/models/{tiny_bundle.name}"


def test_the_picture_is_that_of_the_pipeline(url: str, pipeline: Pipeline) -> None:
    picture = InferenceClient(model=url).text_to_image("red cat", negative_prompt="dog", **ASKED)
    expected = pipeline("red cat", negative_prompt="dog", **ASKED).images[0]
    assert np.array_equal(picture, expected)
    assert picture.text["seed"] == "7"  # type: ignore[attr-defined]


def test_the_asynchronous_client_gets_the_same(url: str, pipeline: Pipeline) -> None:
    async def draw() -> Any:
        async with AsyncInferenceClient(model=url) as client:
            return await client.text_to_image("red cat", **ASKED)

    assert np.array_equal(asyncio.run(draw()), pipeline("red cat", **ASKED).images[0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scheduler": "Euler"}, "compiled into the bundle"),
        ({"num_inference_steps": 61}, "at most 60"),
        ({"width": 65}, "width"),
        ({"extra_body": {"strength": 1}}, "strength"),
    ],
)
def test_errors_say_what_is_wrong(url: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRequestError, match=text):
        InferenceClient(model=url).text_to_image("red cat", **changes)


def test_an_unknown_model_is_not_found(api_server: ServerProcess) -> None:
    with pytest.raises(HfHubHTTPError, match="does not exist") as found:
        InferenceClient(model=f"{api_server.url}/hf/models/another").text_to_image("red cat")
    assert found.value.response.status_code == 404
