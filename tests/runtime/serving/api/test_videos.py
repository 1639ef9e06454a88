"""Videos over HTTP: the official OpenAI client and plain requests against a real server with both kinds of models."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image
from serving_process import ServerProcess, server_process

from ditc.runtime.metrics import psnr
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.video_files import video_bytes

# The official client marks its videos API as deprecated, because OpenAI has ended its own service.
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
ASKED: dict[str, Any] = {"prompt": "a cat", "size": "64x32"}
EXTRA: dict[str, Any] = {"seed": 3, "frames": 5, "num_inference_steps": 2}
# Work that takes far longer than a few requests.
LONG: dict[str, Any] = {"frames": 17, "num_inference_steps": 100}
# H.264 with one colour for four pixels; the tiny model's noise has another colour in each.
LOSSY_DB = 20.0


@pytest.fixture(scope="module")
def server(video_bundle: Path, tiny_bundle: Path) -> Iterator[ServerProcess]:
    """A server whose default model draws videos. The other one draws pictures, and is not open at first."""
    bounds = ("--max-jobs", "3", "--max-frames", "17", "--max-video-pixels", "40000", "--max-queue", "4")
    names = ("--name", f"clips={video_bundle}", "--name", f"demo={tiny_bundle}")
    with server_process(*names, *bounds, "--warm-up-seconds", "0", "--no-self-test") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def frames(video_bundle: Path) -> list[Image.Image]:
    with Pipeline.load(video_bundle, threads=1) as pipeline:
        output = pipeline("a cat", height=32, width=64, **EXTRA)
    return list(output.frames[0])


def pictures_of(webp: bytes) -> list[np.ndarray[Any, Any]]:
    film, found = Image.open(BytesIO(webp)), []
    for index in range(film.n_frames):  # type: ignore[attr-defined]
        film.seek(index)
        found.append(np.asarray(film.convert("RGB")))
    return found


def metric(server: ServerProcess, name: str) -> float:
    text = server.get("/metrics")[2].decode()
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)


def asked_for(server: ServerProcess, method: str, path: str) -> tuple[int, Any]:
    with urllib.request.urlopen(
        urllib.request.Request(server.url + path, method=method), timeout=60
    ) as answer:
        return answer.status, json.loads(answer.read())


def until(done: Any, seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_the_official_client_gets_an_mp4_file_with_the_frames_of_the_pipeline(
    client: OpenAI, server: ServerProcess, frames: list[Image.Image]
) -> None:
    av = pytest.importorskip("av", reason="needs the extra: pip install ditc[video]")
    job = client.videos.create_and_poll(**ASKED, extra_body=EXTRA, poll_interval_ms=20)
    assert (job.status, job.progress, job.object) == ("completed", 100, "video")
    assert (job.size, job.seconds, job.prompt, job.model) == ("64x32", "0.625", "a cat", "clips")
    assert job.completed_at and job.expires_at and job.error is None
    details = job.ditc  # type: ignore[attr-defined]
    assert (details["seed"], details["frames"], details["fps"]) == (3, 5, 8)
    assert (details["steps_done"], details["frames_done"]) == (2, 5)
    file = client.videos.download_content(job.id)
    assert file.response.headers["content-type"] == "video/mp4"
    assert file.response.headers["content-disposition"] == f'attachment; filename="{job.id}.mp4"'
    with av.open(BytesIO(file.content)) as film:
        read = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 8
        settings = json.loads(film.metadata["comment"])
    assert settings["seed"] == "3" and settings["prompt"] == "a cat"
    assert json.loads(settings["settings"])["frames"] == 5
    for ours, theirs in zip(read, frames, strict=True):
        assert psnr(ours / 255, np.asarray(theirs) / 255) >= LOSSY_DB
    assert job.id in [one.id for one in client.videos.list(limit=100)]
    assert client.videos.delete(job.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(job.id)
    assert metric(server, 'ditc_videos_total{model="clips"}') >= 1
    assert metric(server, 'ditc_frames_total{model="clips"}') >= 5


def test_plain_json_gets_an_animated_webp_that_is_bit_for_bit_that_of_the_pipeline(
    server: ServerProcess, client: OpenAI, frames: list[Image.Image]
) -> None:
    body = {**ASKED, "seed": 3, "num_inference_steps": 2, "seconds": 0.5, "output_format": "webp", "fps": 10}
    status, _, job = server.post("/v1/videos", body)
    assert status == 200 and job["status"] in ("queued", "in_progress") and job["id"].startswith("video_")
    until(lambda: server.get(f"/v1/videos/{job['id']}")[2]["status"] == "completed")
    status, headers, content = server.get(f"/v1/videos/{job['id']}/content")
    assert (status, headers["content-type"]) == (200, "image/webp")
    assert headers["content-disposition"].endswith('.webp"')
    expected = video_bytes(frames, "webp", {}, fps=10, threads=1)
    for ours, theirs in zip(pictures_of(content), pictures_of(expected), strict=True):
        assert np.array_equal(ours, theirs)
    client.videos.delete(job["id"])


def test_progress_counts_steps_and_frames(client: OpenAI, server: ServerProcess) -> None:
    job = client.videos.create(**ASKED, extra_body={"frames": 17, "num_inference_steps": 10})
    seen = [(0, 0, 0)]
    while True:
        now = client.videos.retrieve(job.id)
        details = now.ditc  # type: ignore[attr-defined]
        seen.append((now.progress, details["steps_done"], details["frames_done"]))
        if now.status == "completed":
            break
        assert now.status in ("queued", "in_progress") and now.progress < 100
    assert seen == sorted(seen) and seen[-1] == (100, 10, 17)
    for progress, steps, decoded in seen[:-1]:
        assert progress <= min(99, 100 * (steps + -(-decoded // 4)) // 15)
        assert decoded == 0 or steps == 10
    client.videos.delete(job.id)


def test_deleting_a_video_in_work_ends_the_work_and_makes_room(client: OpenAI, server: ServerProcess) -> None:
    before = metric(server, 'ditc_requests_total{model="clips",outcome="cancelled"}')
    jobs = [client.videos.create(**ASKED, extra_body=LONG) for _ in range(3)]
    with pytest.raises(openai.RateLimitError) as found:
        client.videos.create(**ASKED, extra_body=EXTRA)
    assert found.value.code == "overloaded" and found.value.response.headers["retry-after"]
    with pytest.raises(openai.RateLimitError):  # jobs of both kinds share the bound
        client.post("/images/jobs", cast_to=object, body={"prompt": "a cat", "model": "demo"})
    with pytest.raises(openai.NotFoundError) as missing:
        client.videos.download_content(jobs[0].id)
    assert missing.value.code == "no_content"
    for job in jobs:
        assert client.videos.delete(job.id).object == "video.deleted"
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(job.id)
    cancelled = 'ditc_requests_total{model="clips",outcome="cancelled"}'
    until(lambda: metric(server, cancelled) == before + 3)
    assert metric(server, "ditc_accepted_requests") == metric(server, "ditc_accepted_pixel_steps") == 0


def test_accepted_work_counts_frames(client: OpenAI, server: ServerProcess) -> None:
    job = client.videos.create(**ASKED, extra_body=LONG)
    assert metric(server, "ditc_accepted_pixel_steps") == 64 * 32 * 17 * 100
    client.videos.delete(job.id)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"frames": 6}, "frames", "use 5 frames"),
        ({"frames": 21}, "frames", "at most 17 frames"),
        ({"frames": 17, "size": "64x64"}, "frames", "69632 pixels in all frames"),
        ({"frames": 5, "seconds": "1"}, "frames", "give only one"),
        ({"seconds": "60"}, "seconds", "481 frames at 8 a second"),
        ({"seconds": "soon"}, "seconds", "must be a number"),
        ({"seconds": "0"}, "seconds", "above 0"),
        ({"fps": 0}, "fps", "at least 1"),
        ({"motion_score": 30}, None, ""),
        ({"num_inference_steps": 101}, "num_inference_steps", "at most 100"),
        ({"n": 2}, "n", "not an argument"),
        ({"image": "http://localhost"}, "image", "not an argument"),
        ({"output_format": "gif"}, "output_format", "must be"),
        ({"size": "65x32"}, "width", "use width 64"),
        ({"prompt": None}, "prompt", "must be a text"),
    ],
)
def test_what_is_wrong_is_said_at_once_in_both_forms_of_the_body(
    server: ServerProcess, client: OpenAI, body: dict[str, Any], param: str | None, said: str
) -> None:
    if param is None:  # the control: the same way with a right argument
        job = client.videos.create(**ASKED, extra_body={**EXTRA, **body})
        client.videos.delete(job.id)
        return
    sent = {**ASKED, **body}
    status, _, answer = server.post("/v1/videos", sent)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert said in answer["error"]["message"]
    if body.get("prompt", "") is None:  # a form has no null
        return
    with pytest.raises(openai.BadRequestError) as found:
        client.videos.create(**ASKED, extra_body=body)
    assert found.value.param == param and said in str(found.value)


def test_bodies_that_are_no_text_are_refused(server: ServerProcess, client: OpenAI) -> None:
    status, _, answer = server.post("/v1/videos", ASKED, {"content-type": "text/plain"})
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
    with pytest.raises(openai.BadRequestError) as form:
        client.post(
            "/videos",
            cast_to=object,
            body=None,
            options={"headers": {"content-type": "multipart/form-data; boundary=x"}},
        )
    assert form.value.code in ("invalid_form", "missing_required_parameter")
    status, _, answer = server.get("/v1/videos/video_none/content?variant=thumbnail")
    assert (status, answer["error"]["param"]) == (400, "variant")


def test_each_kind_of_model_names_its_own_path(server: ServerProcess, client: OpenAI) -> None:
    kinds = {model.id: model.ditc for model in client.models.list()}  # type: ignore[attr-defined]
    assert (kinds["clips"]["kind"], kinds["clips"]["frames"], kinds["clips"]["fps"]) == ("video", 9, 8)
    assert (kinds["demo"]["kind"], kinds["demo"]["frames"]) == ("image", None)
    assert "text-to-video" in kinds["clips"]["capabilities"] and kinds["demo"]["loaded"] is False
    for path, body in (
        ("/v1/images/generations", {"prompt": "a cat"}),
        ("/v1/images/jobs", {"prompt": "a cat", "model": "clips"}),
        ("/hf/models/clips", {"inputs": "a cat"}),
    ):
        status, _, answer = server.post(path, body)
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "wrong_path", "model")
        assert (
            "draws videos" in answer["error"]["message"] and "POST /v1/videos" in answer["error"]["message"]
        )
    for _ in range(2):  # before the model is open, and after that
        status, _, answer = server.post("/v1/videos", {"prompt": "a cat", "model": "demo"})
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "wrong_path", "model")
        assert "draws pictures" in answer["error"]["message"]
        assert "POST /v1/images/generations" in answer["error"]["message"]
        drawn = server.post(
            "/v1/images/generations", {"prompt": "a cat", "model": "demo", "num_inference_steps": 1}
        )
        assert drawn[0] == 200
    assert server.post("/v1/videos", {"prompt": "a cat", "model": "none"})[0] == 404


def test_one_idempotency_key_gets_one_video(client: OpenAI) -> None:
    header = {"Idempotency-Key": "one"}
    first, again = (client.videos.create(**ASKED, extra_body=EXTRA, extra_headers=header) for _ in range(2))
    assert first.id == again.id
    with pytest.raises(openai.UnprocessableEntityError):
        client.videos.create(**ASKED, extra_body={**EXTRA, "seed": 4}, extra_headers=header)
    client.videos.delete(first.id)


def test_a_deleted_job_is_known_again_to_who_asks_with_its_idempotency_key(client: OpenAI) -> None:
    header = {"Idempotency-Key": "deleted"}
    first = client.videos.create(**ASKED, extra_body=EXTRA, extra_headers=header)
    client.videos.poll(first.id, poll_interval_ms=50)
    client.videos.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(first.id)
    again = client.videos.create(**ASKED, extra_body=EXTRA, extra_headers=header)
    assert client.videos.poll(again.id, poll_interval_ms=50).status == "completed"
    client.videos.delete(again.id)


def test_a_server_of_videos_alone_has_no_page(video_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    from ditc.runtime.cli import main

    assert main(["serve", str(video_bundle), "--ui", "--port", "0"]) != 0
    assert "draws videos" in capsys.readouterr().err
