"""Forms with pictures are read within bounds, and what is wrong with them is told before anything else."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

import pytest
from PIL import Image
from serving_thread import Answer, ServerThread, server_thread

FORM = "multipart/form-data; boundary=X"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with server_thread() as running:
        yield running


def png(side: int = 8) -> bytes:
    file = BytesIO()
    Image.new("RGB", (side, side)).save(file, format="PNG")
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
        (
            [PROMPT, file("control_image", png())],
            "control_image",
            "invalid_value",
        ),  # this bundle has no ControlNet
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
