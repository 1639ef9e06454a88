"""Forms with pictures are read within bounds, and what is wrong with them is told before anything else."""

from __future__ import annotations

import json
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving_thread import Answer, ServerThread, server_thread

from ditc.runtime.load_options import LoadOptions
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.serving.api import uploads
from ditc.runtime.serving.api.byte_room import Need
from ditc.runtime.serving.api.request_limits import RequestLimits
from ditc.runtime.serving.api.upload_formats import StillPicture
from ditc.runtime.serving.api.uploads import PIXEL_BYTES
from ditc.runtime.serving.http.app import create_app
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission, Bounds

FORM = "multipart/form-data; boundary=X"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with server_thread() as running:
        yield running


def png(side: int = 8, mode: str = "RGB") -> bytes:
    file = BytesIO()
    Image.new(mode, (side, side)).save(file, format="PNG")
    return file.getvalue()


def field(name: str, text: str) -> bytes:
    return f'--X\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()


def file(name: str, data: bytes) -> bytes:
    head = f'--X\r\nContent-Disposition: form-data; name="{name}"; filename="a"\r\n\r\n'
    return head.encode() + data + b"\r\n"


def sent(server: ServerThread, *parts: bytes, media_type: str = FORM) -> Answer:
    body = b"".join(parts) + b"--X--\r\n"
    answer = server.ask("POST", "/v1/images/edits", body, {"Content-Type": media_type})
    assert answer.status == 400
    return answer


PROMPT = field("prompt", "cat")


@pytest.mark.parametrize(
    ("parts", "param", "code"),
    [
        ([PROMPT], "image", "missing_required_parameter"),
        ([file("image", png())], "prompt", "missing_required_parameter"),
        ([PROMPT, field("image", "http://localhost/cat.png")], "image", "unknown_parameter"),
        ([PROMPT, field("strength", "1.5")], "strength", "invalid_value"),
        ([PROMPT, field("fidelity", "1")], "fidelity", "unknown_parameter"),
        ([PROMPT, field("n", "11"), file("image", png())], "n", "invalid_value"),
        ([PROMPT, field("n", "9" * 5000), file("image", png())], "n", "invalid_value"),
        ([PROMPT, field("quality", "hd"), file("image", png())], "quality", "unsupported_value"),
        ([PROMPT, file("image", png()), file("image", png())], "image", "invalid_value"),
        ([PROMPT, file("image", png()), file("video", png())], "video", "unknown_parameter"),
        ([PROMPT, file("image", png()[:-20])], "image", "invalid_value"),
        ([PROMPT, file("image", png()), file("mask", b"<svg/>")], "mask", "invalid_value"),
        ([PROMPT, file("image", png(2049))], "image", "image_too_large"),
        ([PROMPT, file("control_image", png()[:-20])], "control_image", "invalid_value"),
        ([PROMPT, file("control_image", png()), file("mask", png())], "image", "missing_required_parameter"),
        ([PROMPT, field("control_guidance_end", "2")], "control_guidance_end", "invalid_value"),
        ([PROMPT, *(file("image", png()) for _ in range(4))], None, "invalid_form"),
        ([field(f"x{number}", "1") for number in range(200)], None, "invalid_form"),
        ([PROMPT, b"--X\r\nno header\r\n\r\n\r\n"], None, "invalid_form"),
    ],
)
def test_what_is_wrong_with_a_form_is_named(
    server: ServerThread, parts: list[bytes], param: str | None, code: str
) -> None:
    error = sent(server, *parts).error
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("media_type", ["multipart/form-data", "multipart/form-data; boundary="])
def test_a_form_without_what_it_takes_to_read_it_is_refused(server: ServerThread, media_type: str) -> None:
    assert sent(server, PROMPT, file("image", png()), media_type=media_type).error["code"]


def as_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/images/generations", "control_image"),
        ("/v1/images/jobs", "control_image"),
        ("/v1/images/jobs", "image"),
    ],
)
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://localhost/edges.png", "is no data URL of a picture"),
        ("edges.png", "is no data URL of a picture"),
        (b64encode(png()).decode(), "is no data URL of a picture"),
        (as_url(b"<svg/>", "image/svg+xml"), "is no data URL of a picture"),
        ("data:image/png;base64,????", "is damaged; send the standard alphabet"),
        (as_url(png()) + "\n", "is damaged; send the standard alphabet"),
        (as_url(png())[:-1], "is damaged; send the standard alphabet"),
        ("data:image/png;base64,", "not a picture that this server reads"),
        (as_url(b"<svg/>"), "not a picture that this server reads"),
        (as_url(png()[:-20]), "damaged or not complete"),
        (as_url(png(2049)), "has 2049x2049 pixels"),
    ],
)
def test_a_picture_in_a_body_is_read_within_the_bounds_of_files(
    server: ServerThread, path: str, name: str, url: str, message: str
) -> None:
    body = json.dumps({"prompt": "cat", name: url}).encode()
    answer = server.ask("POST", path, body, {"Content-Type": "application/json"})
    assert answer.status == 400
    assert answer.error["param"] == name and message in answer.error["message"]
    assert len(answer.body) < 1000  # the picture is not repeated


def _requests(count: int) -> dict[str, tuple[bytes, str]]:
    """By paths, a body with so many pictures, and its media type."""
    given = dict.fromkeys(("image", "control_image")[:count], png(64))
    form = b"".join([PROMPT, field("model", "none"), *(file(name, data) for name, data in given.items())])
    urls = {name: as_url(data) for name, data in given.items()}
    job = json.dumps({"prompt": "cat", "model": "none", **urls}).encode()
    return {"/v1/images/edits": (form + b"--X--\r\n", FORM), "/v1/images/jobs": (job, "application/json")}


def test_nothing_is_decoded_before_there_is_room_for_all_pictures_of_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode, decoded = uploads._decoded, list[StillPicture]()
    monkeypatch.setattr(uploads, "_decoded", lambda still: (decoded.append(still), decode(still))[1])
    app = create_app(
        Models({"tiny": Path("nowhere")}, admission=Admission(Bounds())),
        limits=RequestLimits(max_picture_bytes=PIXEL_BYTES * 64 * 64),  # one picture
    )
    room = app.state.api._uploads
    with server_thread(app) as running:
        for path, (body, media_type) in _requests(2).items():
            answer = running.ask("POST", path, body, {"Content-Type": media_type})
            assert (answer.status, answer.error["code"]) == (400, "too_much_work")
            assert f"need {2 * room.most} bytes of memory, of at most {room.most}" in answer.error["message"]
        assert not decoded
        held = room.take(Need(1))
        for path, (body, media_type) in _requests(1).items():
            answer = running.ask("POST", path, body, {"Content-Type": media_type})
            assert (answer.status, answer.error["code"]) == (429, "overloaded")
            assert int(answer.headers["retry-after"]) > 0
        assert not decoded
        held()
        for path, (body, media_type) in _requests(1).items():
            answer = running.ask("POST", path, body, {"Content-Type": media_type})
            assert answer.error["code"] == "model_not_found"
        assert len(decoded) == 2 and room.taken == 0


def test_a_control_picture_is_drawn_after(control_bundle: Path) -> None:
    models = Models(
        {"control": control_bundle},
        admission=Admission(Bounds()),
        load=LoadOptions(threads=1),
        warm_up_seconds=0.0,
    )
    with closing(models), server_thread(models=models) as running:
        # Transparent, which is seen on white.
        clear = png(mode="RGBA")
        sizes = [field("width", "64"), field("height", "64"), field("num_inference_steps", "2")]
        fields = [PROMPT, *sizes, field("seed", "3"), field("allow_uniform", "true")]
        more = [file("control_image", clear), field("controlnet_conditioning_scale", "0.5")]
        body = b"".join([*fields, *more]) + b"--X--\r\n"
        answer = running.ask("POST", "/v1/images/edits", body, {"Content-Type": FORM})
        settings = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 3, "allow_uniform": True}
        given = {"prompt": "cat", "control_image": as_url(clear), "controlnet_conditioning_scale": 0.5}
        in_json = running.ask(
            "POST",
            "/v1/images/generations",
            json.dumps(settings | given).encode(),
            {"Content-Type": "application/json"},
        )
    assert (answer.status, in_json.status) == (200, 200), (answer, in_json)
    found, same = (
        Image.open(BytesIO(b64decode(json.loads(each.body)["data"][0]["b64_json"])))
        for each in (answer, in_json)
    )
    np.testing.assert_array_equal(np.asarray(found), np.asarray(same))
    control = {"control_image": Image.new("RGBA", (8, 8)), "controlnet_conditioning_scale": 0.5}
    with Pipeline.load(control_bundle, threads=1) as pipeline:
        expected = pipeline("cat", **settings, **control).images[0]
        without = pipeline("cat", **settings).images[0]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert (np.asarray(expected) != np.asarray(without)).any()


def test_a_job_draws_from_a_picture_what_edits_draw(tiny_bundle: Path) -> None:
    models = Models(
        {"tiny": tiny_bundle}, admission=Admission(Bounds()), load=LoadOptions(threads=1), warm_up_seconds=0.0
    )
    blocks = np.random.default_rng(2).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture, mask = Image.fromarray(blocks).resize((64, 64)), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    files: dict[str, bytes] = {}
    for name, given in (("image", picture), ("mask", mask)):
        content = BytesIO()
        given.save(content, format="PNG")
        files[name] = content.getvalue()
    settings = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 3, "strength": 0.5}
    json_type = {"Content-Type": "application/json"}
    with closing(models), server_thread(models=models) as running:

        def job(**pictures: bytes) -> Image.Image:
            urls = {name: as_url(data) for name, data in pictures.items()}
            body = json.dumps({"prompt": "cat", **settings, **urls}).encode()
            answer = running.ask("POST", "/v1/images/jobs", body, json_type)
            assert answer.status == 200, answer
            path, end = f"/v1/images/jobs/{json.loads(answer.body)['id']}", time.monotonic() + 60
            while json.loads(running.ask("GET", path).body)["status"] in ("queued", "in_progress"):
                assert time.monotonic() < end
                time.sleep(0.02)
            return Image.open(BytesIO(running.ask("GET", f"{path}/content").body))

        drawn = {
            names: job(**{name: files[name] for name in names}) for names in (("image",), ("image", "mask"))
        }
        fields = [PROMPT, *(field(name, str(value)) for name, value in settings.items())]
        for names, found in drawn.items():
            parts = [*fields, *(file(name, files[name]) for name in names), b"--X--\r\n"]
            answer = running.ask("POST", "/v1/images/edits", b"".join(parts), {"Content-Type": FORM})
            same = Image.open(BytesIO(b64decode(json.loads(answer.body)["data"][0]["b64_json"])))
            np.testing.assert_array_equal(np.asarray(found), np.asarray(same))
        body = json.dumps({"prompt": "cat", "mask": as_url(files["mask"])}).encode()
        alone = running.ask("POST", "/v1/images/jobs", body, json_type)
    assert (alone.error["param"], alone.error["code"]) == ("image", "missing_required_parameter")
    assert (np.asarray(drawn["image",]) != np.asarray(drawn["image", "mask"])).any()
