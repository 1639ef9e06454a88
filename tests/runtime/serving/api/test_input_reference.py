"""Videos from pictures over HTTP: every form of OpenAI's `input_reference` gives the frames of the pipeline."""

from __future__ import annotations

import gc
import json
import shutil
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image
from serving_thread import ServerThread, server_thread

from ditc.runtime.bundle.manifest import load_manifest, save_manifest
from ditc.runtime.image_input import GivenImages
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.serving.http.transport_limits import TransportLimits
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.spec import VAE_ENCODER
from ditc.runtime.video_files import video_bytes

# The official client marks its videos API as deprecated, because OpenAI has ended its own service.
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
MODEL, TEXTS_ALONE, BINNED = "clips", "older", "binned"
EXTRA: dict[str, Any] = {"seed": 3, "frames": 5, "num_inference_steps": 2, "output_format": "webp", "fps": 8}
SETTINGS: dict[str, Any] = {"seed": 3, "frames": 5, "num_inference_steps": 2}
MOST_BODY_BYTES = 50_000


def _blocks() -> Image.Image:
    blocks = np.random.default_rng(1).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    return Image.fromarray(blocks, "RGBA").resize((90, 70), Image.Resampling.BICUBIC)


# With transparency, and to be turned as its EXIF orientation says.
TURNED = Image.Exif()
TURNED[0x0112] = 6
PICTURE = _blocks()


def file_of(picture: Image.Image = PICTURE, form: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    picture.save(file, format=form, **options)
    return file.getvalue()


def url_of(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


@pytest.fixture(scope="module")
def bundles(video_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundle of videos, one without what encodes a picture, and one with bins."""
    root = tmp_path_factory.mktemp("bundles")
    manifest = load_manifest(video_bundle)
    stages = {name: stage for name, stage in manifest.stages.items() if name != VAE_ENCODER}
    defaults = replace(manifest.defaults, bins=((32, 64), (64, 32)))
    changed = {
        TEXTS_ALONE: replace(manifest, stages=stages),
        BINNED: replace(manifest, defaults=defaults),
    }
    for name, other in changed.items():
        shutil.copytree(video_bundle, root / name)
        save_manifest(other, root / name)
    return {MODEL: video_bundle, **{name: root / name for name in changed}}


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path]) -> Iterator[ServerThread]:
    models = Models(bundles, admission=Admission(Bounds()), load=LoadOptions(threads=1), warm_up_seconds=0.0)
    transport = TransportLimits(max_body_bytes=MOST_BODY_BYTES)
    with closing(models), server_thread(models=models, transport=transport) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerThread) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://localhost:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def pipeline(video_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(video_bundle, threads=1) as loaded:
        yield loaded


def post(server: ServerThread, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    answer = server.ask("POST", "/v1/videos", json.dumps({"prompt": "a cat", **body}).encode(), headers)
    return answer.status, json.loads(answer.body)


def content_of(client: OpenAI, id: str) -> bytes:
    end = time.monotonic() + 60
    while (job := client.videos.retrieve(id)).status in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert job.status == "completed", job.error
    return client.videos.download_content(id).content


def pictures_of(webp: bytes) -> list[np.ndarray[Any, Any]]:
    film, found = Image.open(BytesIO(webp)), []
    for index in range(film.n_frames):  # type: ignore[attr-defined]
        film.seek(index)
        found.append(np.asarray(film.convert("RGB")))
    return found


def drawn(pipeline: Pipeline, data: bytes | None, **settings: Any) -> list[np.ndarray[Any, Any]]:
    """The pipeline's own frames, through the same lossy file."""
    image = None if data is None else Image.open(BytesIO(data))
    frames = pipeline("a cat", image=image, **SETTINGS, **settings).frames[0]
    return pictures_of(video_bytes(list(frames), "webp", {}, fps=8, threads=1))


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs) == SETTINGS["frames"]
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("form", ["file", "object in a form", "object in JSON"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_each_form_of_the_picture_gives_the_frames_of_the_pipeline(
    server: ServerThread, client: OpenAI, pipeline: Pipeline, form: str, kind: str
) -> None:
    """The official client sends a file, or what is in extra_body as a text of the form."""
    picture = PICTURE.convert("RGB") if kind == "JPEG" else PICTURE
    data = file_of(picture, kind, exif=TURNED.tobytes())
    url = url_of(data, kind.lower())
    asked: dict[str, Any] = {"prompt": "a cat", "size": "64x32"}
    if form == "file":
        job = client.videos.create(**asked, input_reference=(f"a.{kind.lower()}", data), extra_body=EXTRA)
    elif form == "object in a form":
        job = client.videos.create(**asked, extra_body={**EXTRA, "input_reference": {"image_url": url}})
    else:
        status, answer = post(server, {**asked, **EXTRA, "input_reference": {"image_url": url}})
        assert status == 200, answer
        job = client.videos.retrieve(answer["id"])
    found = pictures_of(content_of(client, job.id))
    assert_same(found, drawn(pipeline, data, height=32, width=64))
    without = drawn(pipeline, None, height=32, width=64)
    assert any(not np.array_equal(one, other) for one, other in zip(found, without, strict=True))


def test_without_a_size_the_video_has_the_bin_of_the_shape_of_the_picture(client: OpenAI) -> None:
    for size, bin_ in (((40, 100), "32x64"), ((100, 40), "64x32")):
        data = file_of(PICTURE.resize(size))
        job = client.videos.create(
            prompt="a cat", model=BINNED, input_reference=("a.png", data), extra_body=EXTRA
        )
        assert job.size == bin_
        client.videos.delete(job.id)


def test_a_file_may_be_larger_than_a_body_of_json(server: ServerThread, client: OpenAI) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise))
    assert len(data) > MOST_BODY_BYTES
    job = client.videos.create(prompt="a cat", input_reference=("a.png", data), extra_body=EXTRA)
    client.videos.delete(job.id)
    status, answer = post(server, {"input_reference": {"image_url": url_of(data)}})
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


def test_one_idempotency_key_is_for_one_picture(client: OpenAI) -> None:
    def create(data: bytes) -> str:
        return client.videos.create(
            prompt="a cat",
            input_reference=("a.png", data),
            extra_body=EXTRA,
            extra_headers={"Idempotency-Key": "picture"},
        ).id

    first = create(file_of())
    assert create(file_of()) == first
    with pytest.raises(openai.UnprocessableEntityError):
        create(file_of(PICTURE.rotate(90)))
    content_of(client, first)


def test_pictures_are_not_kept_after_their_videos(client: OpenAI) -> None:
    """A job and an idempotency key are known for an hour, and a picture may have 12 MB."""
    job = client.videos.create(
        prompt="a cat",
        input_reference=("a.png", file_of()),
        extra_body=EXTRA,
        extra_headers={"Idempotency-Key": "kept"},
    )
    content_of(client, job.id)
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is GivenImages]
    assert client.videos.retrieve(job.id).status == "completed"


REFERENCE = "input_reference"


@pytest.mark.parametrize(
    ("reference", "code", "said"),
    [
        ({"image_url": "http://localhost/cat.png"}, "invalid_value", "is no data URL of a picture"),
        (
            {"image_url": "data:image/png;base64,????"},
            "invalid_value",
            "base64 of input_reference is damaged",
        ),
        ({"image_url": url_of(b"<svg/>")}, "invalid_value", "not a picture that this server reads"),
        ({"image_url": url_of(file_of()[:-20])}, "invalid_value", "damaged or not complete"),
        (
            {"image_url": url_of(file_of(Image.new("L", (2049, 2049))))},
            "image_too_large",
            "has 2049x2049 pixels",
        ),
        ({"file_id": "file_1"}, "unsupported_value", "keeps no files of clients"),
        ({"file_id": "file_1", "image_url": url_of(file_of())}, "unsupported_value", "keeps no files"),
        ({}, "missing_required_parameter", "has no image_url"),
        ("cat.png", "invalid_value", "must be an object"),
        ({"image_url": 3}, "invalid_value", "must be a text"),
        ({"url": "x"}, "unknown_parameter", "is not an argument"),
    ],
)
def test_what_is_wrong_with_a_picture_is_said_in_both_forms_of_the_body(
    server: ServerThread, client: OpenAI, reference: Any, code: str, said: str
) -> None:
    status, answer = post(server, {REFERENCE: reference})
    error = answer["error"]
    assert (status, error["code"]) == (400, code) and error["param"].startswith(REFERENCE), error
    assert said in error["message"] and len(error["message"]) < 300
    if reference in ({}, {"image_url": 3}):  # a form has neither
        return
    with pytest.raises(openai.BadRequestError) as found:
        client.videos.create(prompt="a cat", extra_body={REFERENCE: reference})
    assert found.value.code == code and said in str(found.value)


def test_what_is_wrong_with_a_file_is_said(client: OpenAI) -> None:
    def refused(**arguments: Any) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as found:
            client.videos.create(prompt="a cat", **arguments)
        return found.value

    for data, said in ((b"no picture", "not a picture that this server reads"), (file_of()[:-20], "damaged")):
        error = refused(input_reference=("a.png", data))
        assert error.param == REFERENCE and said in str(error)
    both = refused(input_reference=file_of(), extra_body={REFERENCE: {"image_url": url_of(file_of())}})
    assert both.param == REFERENCE and "give only one of them" in str(both)
    other = client.with_options(max_retries=0)
    with pytest.raises(openai.BadRequestError) as found:
        other.post(
            "/videos",
            cast_to=object,
            body={"prompt": "a cat"},
            files={"image": ("a.png", file_of())},
            options={"headers": {"content-type": "multipart/form-data"}},
        )
    assert (found.value.param, found.value.code) == ("image", "unknown_parameter")


def test_a_video_of_one_frame_leaves_nothing_to_draw(server: ServerThread) -> None:
    status, answer = post(server, {"frames": 1, REFERENCE: {"image_url": url_of(file_of())}})
    assert (status, answer["error"]["param"]) == (400, REFERENCE)
    assert answer["error"]["message"].startswith("input_reference is the first frame")
    assert "use 5 frames or more" in answer["error"]["message"]


def test_a_model_of_texts_alone_refuses_a_picture_before_it_is_opened_and_after_that(
    server: ServerThread, client: OpenAI
) -> None:
    kinds = {model.id: model.ditc for model in client.models.list()}  # type: ignore[attr-defined]
    assert "image-to-video" in kinds[MODEL]["capabilities"]
    assert "image-to-video" not in kinds[TEXTS_ALONE]["capabilities"]
    for loaded in (False, True):
        assert client.models.retrieve(TEXTS_ALONE).ditc["loaded"] is loaded  # type: ignore[attr-defined]
        status, answer = post(server, {"model": TEXTS_ALONE, REFERENCE: {"image_url": url_of(file_of())}})
        error = answer["error"]
        assert (status, error["param"], error["code"]) == (400, REFERENCE, "unsupported_value")
        assert "the model older draws videos from texts alone; leave it out" in error["message"]
        assert post(server, {"model": TEXTS_ALONE, **EXTRA})[0] == 200
