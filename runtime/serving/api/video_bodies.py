"""The body of POST /v1/videos: JSON, or the form that OpenAI's clients send."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ditc.runtime.serving.api.schemas import VideoBody
from ditc.runtime.serving.refusals import Invalid

FORM = "multipart/form-data"
MOST_FIELD_BYTES = 2**20
SCHEMA = VideoBody.model_json_schema()
# FastAPI takes a body in one form alone.
REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": SCHEMA},
            FORM: {
                "schema": {
                    **SCHEMA,
                    "description": "The same fields, without those that are lists. Numbers are texts.",
                    "properties": {
                        name: field
                        for name, field in SCHEMA["properties"].items()
                        if "array" not in str(field)
                    },
                }
            },
        },
    }
}


async def read_video_body(http: Request) -> VideoBody:
    """The fields of a request for a video.

    Raises:
        RequestValidationError: a field is unknown, missing or wrong.
        Invalid: the body is neither JSON nor a form, or has a file.
        ClientDisconnect: the client has gone away.
    """
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if media_type == FORM:
            return VideoBody.model_validate_strings(await _fields(http), strict=False)
        if media_type == "application/json" or media_type.endswith("+json"):
            return VideoBody.model_validate_json(await http.body())
    except ValidationError as e:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in e.errors()]) from e
    raise HTTPException(415)


async def _fields(http: Request) -> dict[str, str]:
    try:
        form = await http.form(
            max_files=1, max_fields=len(VideoBody.model_fields), max_part_size=MOST_FIELD_BYTES
        )
    except HTTPException as e:
        raise e if e.status_code != 400 else _unreadable() from e
    except (ValueError, LookupError) as e:  # the parser's own errors, and unknown character sets
        raise _unreadable() from e
    try:
        fields: dict[str, str] = {}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                raise _no_file(name)
            fields[name] = value
        return fields
    finally:
        await form.close()


def _no_file(name: str) -> Invalid:
    if name == "input_reference":
        return Invalid(
            "input_reference is given, and this server draws videos from texts alone",
            hint="leave it out",
            param=name,
            code="unsupported_value",
        )
    return Invalid(
        f"{name!r:.80} is not a file of this path",
        hint="send texts alone",
        param=name[:80],
        code="unknown_parameter",
    )


def _unreadable() -> Invalid:
    return Invalid("the form cannot be read", hint=f"send {FORM} without files, or JSON", code="invalid_form")
