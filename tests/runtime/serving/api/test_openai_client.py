"""The official OpenAI client, unmodified, against a real server process."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Video
from PIL import Image, ImageOps
from serving_process import ServerProcess, server_process

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request

ASKED: dict[str, Any] = {"prompt": "red cat", "size": "64x64"}
EXTRA: dict[str, Any] = {"seed": 7, "num_inference_steps": 3}
# Steps that take longer than a few requests.
MANY = {"num_inference_steps": 60}


@pytest.fixture(scope="module")
def client(api_server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected(pipeline: Pipeline) -> list[np.ndarray[Any, Any]]:
    """What Pipeline draws, one picture at a time as the server does."""
    request = Request(prompt="red cat", height=64, width=64, num_images_per_prompt=2, **EXTRA)
    plan = replace(pipeline.plan(request), at_once=1)
    return [np.asarray(picture) for part in pipeline.draw_each(plan) for picture in part.pictures]


def opened(b64_json: str | None) -> Image.Image:
    assert b64_json
    return Image.open(BytesIO(base64.b64decode(b64_json)))


def test_pictures_are_those_of_the_pipeline_and_carry_their_settings(
    client: OpenAI, expected: list[Any], pipeline: Pipeline
) -> None:
    answer = client.images.generate(**ASKED, n=2, extra_body=EXTRA)
    assert answer.data and len(answer.data) == 2
    assert (answer.size, answer.background, answer.output_format) == ("64x64", "opaque", "png")
    assert (
        answer.usage and answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    )
    details = answer.ditc  # type: ignore[attr-defined]
    assert (details["seed"], details["num_inference_steps"]) == (7, 3)
    assert (details["bundle"], details["certified"]) == (pipeline.manifest.digest, not pipeline.uncertified)
    assert (details["backend"], details["precision"]) == ("onnxruntime", "fp32")
    for index, one in enumerate(answer.data):
        picture = opened(one.b64_json)
        assert np.array_equal(picture, expected[index])
        assert picture.text["seed"] == "7"  # type: ignore[attr-defined]
        assert picture.text["bundle"] == pipeline.manifest.digest  # type: ignore[attr-defined]


def test_a_random_seed_is_told_and_draws_the_same_again(client: OpenAI) -> None:
    steps = {"num_inference_steps": 2}
    first = client.images.generate(**ASKED, extra_body=steps)
    seed = first.ditc["seed"]  # type: ignore[attr-defined]
    again = client.images.generate(**ASKED, extra_body={**steps, "seed": seed})
    assert first.data and again.data
    assert np.array_equal(opened(first.data[0].b64_json), opened(again.data[0].b64_json))


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_other_formats_are_those_that_were_asked_for(client: OpenAI, form: Any) -> None:
    answer = client.images.generate(**ASKED, output_format=form, output_compression=80, extra_body=EXTRA)
    assert answer.data
    assert opened(answer.data[0].b64_json).format == form.upper()
    assert answer.output_format == form


def test_a_stream_brings_previews_and_the_same_pictures(client: OpenAI, expected: list[Any]) -> None:
    stream = client.images.generate(**ASKED, n=2, stream=True, partial_images=2, extra_body=EXTRA)
    events = list(stream)
    previews = [event for event in events if event.type == "image_generation.partial_image"]
    completed = [event for event in events if event.type == "image_generation.completed"]
    # Whether the two pictures run together or one after the other follows from measured times.
    order = [(one.image_index, one.partial_image_index) for one in previews]  # type: ignore[attr-defined]
    assert sorted(order) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {opened(one.b64_json).size for one in previews} == {(64, 64)}
    assert events[-2:] == completed
    for picture, event in zip(expected, completed, strict=True):
        assert np.array_equal(opened(event.b64_json), picture)
        assert event.ditc["seed"] == 7  # type: ignore[union-attr]


def test_progress_events_pass_through_the_client_under_their_own_name(client: OpenAI) -> None:
    events = list(client.images.generate(**ASKED, stream=True, extra_body=EXTRA))
    progress: list[Any] = [event for event in events if str(event.type) == "image_generation.progress"]
    assert progress[0].step == 0 and progress[0].ditc["seed"] == 7
    assert [event.step for event in progress] == sorted({event.step for event in progress})
    assert progress[-1].total == 3


def test_the_asynchronous_client_gets_the_same(api_server: ServerProcess, expected: list[Any]) -> None:
    async def both() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{api_server.url}/v1", api_key="none", max_retries=0) as client:
            plain = await client.images.generate(**ASKED, extra_body=EXTRA)
            stream = await client.images.generate(**ASKED, stream=True, partial_images=1, extra_body=EXTRA)
            last = [event async for event in stream][-1]
            assert plain.data
            return [plain.data[0].b64_json, last.b64_json]

    for picture in asyncio.run(both()):
        assert np.array_equal(opened(picture), expected[0])


@pytest.mark.parametrize(
    ("changes", "kind", "param"),
    [
        ({"extra_body": {"latents": [1]}}, openai.BadRequestError, "latents"),
        ({"n": 5}, openai.BadRequestError, "n"),
        ({"n": 11}, openai.BadRequestError, "n"),
        ({"size": "65x64"}, openai.BadRequestError, "width"),
        ({"size": "huge"}, openai.BadRequestError, "size"),
        ({"prompt": "x" * 201}, openai.BadRequestError, "prompt"),
        ({"response_format": "url"}, openai.BadRequestError, "response_format"),
        ({"quality": "hd"}, openai.BadRequestError, "quality"),
        ({"extra_body": {"num_inference_steps": 61}}, openai.BadRequestError, "num_inference_steps"),
        ({"extra_body": {"max_sequence_length": 9999}}, openai.BadRequestError, "max_sequence_length"),
        ({"model": "gpt-image-1"}, openai.NotFoundError, "model"),
        ({"extra_body": {"timeout": 1e-6}}, openai.InternalServerError, None),
    ],
)
def test_errors_are_the_typed_exceptions_of_the_client(
    client: OpenAI, changes: dict[str, Any], kind: type[openai.APIStatusError], param: str | None
) -> None:
    for stream in (False, True):
        with pytest.raises(kind) as found:
            client.images.generate(**{**ASKED, **changes}, stream=stream)
        assert found.value.request_id
        assert found.value.param == param
        assert found.value.code and found.value.type


def test_the_client_does_not_repeat_what_would_fail_again(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as found:
        client.with_options(max_retries=2).images.generate(
            **ASKED, extra_headers={"x-request-timeout": "0.000001"}
        )
    assert found.value.status_code == 504
    assert "x-stainless-retry-count" not in found.value.request.headers or (
        found.value.request.headers["x-stainless-retry-count"] == "0"
    )


def test_an_idempotency_key_gets_one_drawing(client: OpenAI) -> None:
    header = {"Idempotency-Key": "test-one"}
    steps = {"num_inference_steps": 2}  # a random seed would differ if it were drawn twice
    first = client.images.generate(**ASKED, extra_body=steps, extra_headers=header)
    again = client.images.generate(**ASKED, extra_body=steps, extra_headers=header)
    assert first.model_dump() == again.model_dump()
    with pytest.raises(openai.UnprocessableEntityError) as found:
        client.images.generate(**ASKED, extra_body={"num_inference_steps": 3}, extra_headers=header)
    assert found.value.code == "idempotency_key_reused"


def test_models_are_listed_with_what_they_draw_by_default(client: OpenAI, pipeline: Pipeline) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve(model.id) == model
    details = model.ditc  # type: ignore[attr-defined]
    assert (details["width"], details["height"]) == (64, 64)
    assert details["bundle"] == pipeline.manifest.digest
    assert (details["loaded"], details["backend"], details["precision"]) == (True, "onnxruntime", "fp32")
    assert "partial_images" in details["capabilities"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_edits_draw_from_a_picture_as_it_is_seen_and_where_it_or_the_mask_is_transparent(
    client: OpenAI, pipeline: Pipeline, tmp_path: Path
) -> None:
    picture = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 50).convert("RGB")
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (0, 0, 45, 70))  # the left half is drawn anew
    clear = picture.copy()
    clear.putalpha(alpha)
    soft = picture.copy()
    soft.putalpha(
        alpha.point(lambda value: max(value, 128))
    )  # half opaque: nothing is to be drawn anew there alone
    made = {"picture": picture, "clear": clear, "white": ImageOps.invert(alpha), "soft": soft}
    for name, image in made.items():
        image.save(tmp_path / f"{name}.png")
    settings: dict[str, Any] = {**EXTRA, "strength": 0.9}

    def edited(image: str, mask: str | None = None) -> np.ndarray[Any, Any]:
        files = {} if mask is None else {"mask": tmp_path / f"{mask}.png"}
        answer = client.images.edit(
            image=tmp_path / f"{image}.png", prompt="red cat", size="64x64", extra_body=settings, **files
        )
        return np.asarray(opened(answer.data[0].b64_json))

    def drawn(image: Image.Image = picture, **images: Any) -> np.ndarray[Any, Any]:
        found = pipeline("red cat", image=image, height=64, width=64, **settings, **images).images[0]
        return np.asarray(found)

    mask = ImageOps.invert(alpha)
    np.testing.assert_array_equal(edited("picture"), drawn())
    for with_mask in ("clear", "white"):
        np.testing.assert_array_equal(edited("picture", with_mask), drawn(mask_image=mask))
        np.testing.assert_array_equal(edited("clear", with_mask), drawn(clear, mask_image=mask))
    np.testing.assert_array_equal(edited("clear"), drawn(clear, mask_image=mask))  # seen on white
    np.testing.assert_array_equal(edited("soft"), drawn(soft))
    assert (edited("picture") != drawn(mask_image=mask)).any()


def test_pictures_that_cannot_be_edited_are_refused(client: OpenAI, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"<svg/>")
    with pytest.raises(openai.BadRequestError, match="not a picture"):
        client.images.edit(image=tmp_path / "no.png", prompt="a red cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    with pytest.raises(openai.BadRequestError, match="leaves no step") as found:
        client.images.edit(
            image=tmp_path / "black.png", prompt="a red cat", size="64x64", extra_body={"strength": 0.0}
        )
    assert found.value.param == "strength"


def test_keys_are_asked_for_and_keep_jobs_and_idempotency_keys_apart(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    names = ("alice", "bob")
    keys = [{"name": name, "key": f"{name}-0123456789abcdef"} for name in names]
    keys[1]["concurrent_requests"] = 1  # type: ignore[assignment]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": keys}))
    (tmp_path / "keys.json").chmod(0o600)
    with server_process(tiny_bundle, "--api-keys", tmp_path / "keys.json") as server:
        alice, bob, eve = (
            OpenAI(base_url=f"{server.url}/v1", api_key=f"{name}-0123456789abcdef", max_retries=0)
            for name in (*names, "eve")
        )
        with pytest.raises(openai.AuthenticationError):
            eve.images.generate(**ASKED)
        job = alice.post("/images/jobs", cast_to=Video, body={**ASKED, **EXTRA})
        with pytest.raises(openai.NotFoundError):
            bob.get(f"/images/jobs/{job.id}", cast_to=Video)
        with pytest.raises(openai.NotFoundError):
            bob.delete(f"/images/jobs/{job.id}", cast_to=object)
        assert wait_for(alice, job).status == "completed"
        header = {"Idempotency-Key": "same"}
        seeds = {
            one.images.generate(**ASKED, extra_headers=header).ditc["seed"]  # type: ignore[attr-defined]
            for one in (alice, alice, bob, bob)
        }
        assert len(seeds) == 2
        bob.post("/images/jobs", cast_to=Video, body={**ASKED, **MANY, "n": 4})
        with pytest.raises(openai.RateLimitError) as found:
            bob.images.generate(**ASKED)
        assert found.value.code == "too_many_concurrent_requests"
        alice.images.generate(**ASKED)


def wait_for(client: OpenAI, job: Video) -> Video:
    end = time.monotonic() + 120
    while job.status in ("queued", "in_progress") and time.monotonic() < end:
        time.sleep(0.02)
        job = client.get(f"/images/jobs/{job.id}", cast_to=Video)
    return job


def test_a_job_is_polled_fetched_and_deleted(client: OpenAI, expected: list[Any]) -> None:
    job = client.post("/images/jobs", cast_to=Video, body={**ASKED, **EXTRA, "n": 2})
    assert job.status in ("queued", "in_progress")
    done = wait_for(client, job)
    assert (done.status, done.progress, done.size) == ("completed", 100, "64x64")
    for index, picture in enumerate(expected):
        content = client.get(
            f"/images/jobs/{job.id}/content", cast_to=bytes, options={"params": {"index": index}}
        )
        assert np.array_equal(Image.open(BytesIO(content)), picture)
    listed: Any = client.get("/images/jobs", cast_to=object)
    assert job.id in [one["id"] for one in listed["data"]]
    removed: Any = client.delete(f"/images/jobs/{job.id}", cast_to=object)
    assert removed == {"id": job.id, "object": "image.job.deleted", "deleted": True, "status": "completed"}
    with pytest.raises(openai.NotFoundError):
        client.get(f"/images/jobs/{job.id}", cast_to=Video)


def test_deleting_a_job_in_work_cancels_it_and_makes_room_for_others(client: OpenAI) -> None:
    jobs = [client.post("/images/jobs", cast_to=Video, body={**ASKED, **MANY, "n": 4}) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as found:
        client.post("/images/jobs", cast_to=Video, body=ASKED)
    assert found.value.response.headers["retry-after"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.get(f"/images/jobs/{jobs[0].id}/content", cast_to=bytes)
    assert missing.value.code == "no_content"
    for job in jobs:
        client.delete(f"/images/jobs/{job.id}", cast_to=object)
        assert wait_for(client, job).status == "cancelled"


def test_a_job_that_is_refused_is_never_created(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.post("/images/jobs", cast_to=Video, body={**ASKED, "stream": True})
