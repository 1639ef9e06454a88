"""The body of POST /v1/videos: JSON, or the form that OpenAI's clients send; and the picture in it, the first frame.

The picture is OpenAI's `input_reference`: a file of a form, or an object with `image_url`, which a form holds as the
text `input_reference[image_url]`.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from ditc.runtime.image_input import given_images
from ditc.runtime.serving.api.api import Api
from ditc.runtime.serving.api.asked import REFERENCE, Asked
from ditc.runtime.serving.api.forms import MULTIPART, checked_body, read_form
from ditc.runtime.serving.api.schemas import MOST_URL_BYTES, VideoBody
from ditc.runtime.serving.refusals import Invalid

_PART_OF_REFERENCE = re.compile(rf"{REFERENCE}\[(\w{{1,40}})\]")


@dataclass(frozen=True, slots=True)
class SentVideo:
    """A request for a video, as a client has sent it.

    Attributes:
        file: the bytes of the file `input_reference`.
        digest: the hash of that file; "" without one.
    """

    body: VideoBody
    file: bytes | None = None
    digest: str = ""


async def read_video_body(http: Request) -> SentVideo:
    """The fields of a request for a video. The picture is not decoded.

    Raises:
        RequestValidationError: a field is unknown, missing or wrong.
        Invalid: the body is neither JSON nor a form, or has a file that is not `input_reference`.
        ClientDisconnect: the client has gone away.
    """
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == MULTIPART:
        fields = len(VideoBody.model_fields) + 1  # input_reference may be two
        form = await read_form(http, files=(REFERENCE,), most_fields=fields, most_field_bytes=MOST_URL_BYTES)
        body = checked_body(lambda: VideoBody.model_validate_strings(_nested(form.fields), strict=False))
        return SentVideo(body, form.files.get(REFERENCE), form.digest)
    if media_type == "application/json" or media_type.endswith("+json"):
        content = await http.body()
        return SentVideo(checked_body(lambda: VideoBody.model_validate_json(content)))
    raise HTTPException(415)


async def with_first_frame(api: Api, asked: Asked, sent: SentVideo, held: ExitStack) -> Asked:
    """What is asked for, with the picture that was sent, if there is one.

    Args:
        held: as in `Api.decoded`.

    Raises:
        Invalid: the picture is damaged, of an unknown format or too large, or it is not sent in one of the two forms.
        Overloaded: there is no room for it.
    """
    picture = _picture(sent)
    if picture is None:
        return asked
    upload = (await api.decoded({REFERENCE: picture}, held))[REFERENCE]
    image = given_images(REFERENCE, upload.image, channels=3)
    return replace(asked, request=replace(asked.request, image=image))


def _picture(sent: SentVideo) -> bytes | str | None:
    """The file or the data URL of the first frame; None without one. Raises Invalid for anything else."""
    reference = sent.body.input_reference
    if reference is None:
        return sent.file
    if sent.file is not None:
        raise Invalid(
            f"{REFERENCE} is given as a file and as an object", hint="give only one of them", param=REFERENCE
        )
    if reference.file_id is not None:
        raise Invalid(
            f"{REFERENCE} has a file_id, but this server keeps no files of clients",
            hint="send the picture itself, as image_url or as a file of a form",
            param=REFERENCE,
            code="unsupported_value",
        )
    if reference.image_url is None:
        raise Invalid(
            f"{REFERENCE} has no image_url",
            hint='send {"image_url": "data:image/png;base64,..."}',
            param=REFERENCE,
            code="missing_required_parameter",
        )
    return reference.image_url


def _nested(fields: dict[str, str]) -> dict[str, Any]:
    """The fields of a form, with the parts of `input_reference` in one object."""
    found: dict[str, Any] = {}
    reference: dict[str, str] = {}
    for name, text in fields.items():
        part = _PART_OF_REFERENCE.fullmatch(name)
        if part is None:
            found[name] = text
        else:
            reference[part[1]] = text
    if reference:
        found.setdefault(REFERENCE, reference)  # a text of that name is refused as no object
    return found


def _request_body() -> dict[str, Any]:
    """What the OpenAPI document says of the two forms of the body. FastAPI takes a body in one form alone."""
    schema = VideoBody.model_json_schema()
    (reference,) = schema.pop("$defs").values()  # a reference would be sought at the top of the document
    plain = dict(schema["properties"])
    plain[REFERENCE] |= {"anyOf": [reference, {"type": "null"}]}
    texts = {name: field for name, field in plain.items() if "array" not in str(field) and name != REFERENCE}
    file = {
        "type": "string",
        "format": "binary",
        "description": "The first frame: a PNG, JPEG or WebP file (default: none).",
    }
    parts = {f"{REFERENCE}[{name}]": field for name, field in reference["properties"].items()}
    form = {
        **schema,
        "description": "The same fields, without those that are lists. Numbers are texts.",
        "properties": {**texts, REFERENCE: file, **parts},
    }
    content = {"application/json": {"schema": {**schema, "properties": plain}}, MULTIPART: {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


REQUEST_BODY = _request_body()
