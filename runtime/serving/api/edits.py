"""POST /v1/images/edits: pictures drawn from other pictures, in OpenAI's multipart form.

No bundle of this version takes a picture (`Request` has no such argument), so every request is refused in the end. The
form and its pictures are read as they will be, so that clients learn first what is wrong with their own requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ditc.runtime.serving.api.answers import ImagesAnswer
from ditc.runtime.serving.api.api import Api, api_of
from ditc.runtime.serving.api.asked import Asked, asked_by_openai
from ditc.runtime.serving.api.clients import GONE
from ditc.runtime.serving.api.openapi import ERRORS, TimeoutHeader
from ditc.runtime.serving.api.schemas import EditBody
from ditc.runtime.serving.api.uploads import Upload, read_upload
from ditc.runtime.serving.refusals import Invalid

router = APIRouter()

# The picture and its mask.
MOST_FILES = 2
MOST_FIELD_BYTES = 2**20
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "prompt"],
                    "properties": {
                        "image": {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP."},
                        "mask": {"type": "string", "format": "binary", "description": "What to draw anew."},
                        "prompt": {"type": "string", "description": "What to draw."},
                    },
                    "description": "And the fields of POST /v1/images/generations that are no lists.",
                }
            }
        },
    }
}


@dataclass(frozen=True, slots=True)
class Edit:
    """A checked request to draw from a picture, in which the mask is transparent where to draw."""

    asked: Asked
    image: Upload
    mask: Upload | None


@router.post(
    "/v1/images/edits",
    response_model=ImagesAnswer,
    openapi_extra=FORM,
    responses=ERRORS,
)
async def edit(http: Request, timeout: TimeoutHeader = "") -> Response:
    """Draw from a picture. Refused in this version, in which every bundle draws from texts only."""
    try:
        form = await http.form(
            max_files=MOST_FILES, max_fields=len(EditBody.model_fields), max_part_size=MOST_FIELD_BYTES
        )
    except HTTPException as e:
        raise e if e.status_code != 400 else _unreadable() from e
    except ClientDisconnect:
        return Response(status_code=GONE)
    except (ValueError, LookupError) as e:  # the parser's own errors, and unknown character sets
        raise _unreadable() from e
    try:
        return _drawn(await _read(api_of(http), form, timeout))
    finally:
        await form.close()


def _drawn(edit: Edit) -> Response:
    """The last step. When `Request` has an image, this hands it to the same drawing as `generations`."""
    raise Invalid(
        f"the image of {edit.image.image.width}x{edit.image.image.height} pixels cannot be used: "
        "every model of this server draws from texts only",
        hint="POST /v1/images/generations draws from a text",
        param="image",
        code="unsupported_operation",
    )


async def _read(api: Api, form: FormData, timeout: str) -> Edit:
    """The fields and pictures of a form.

    Raises:
        RequestValidationError: a field is unknown, missing or wrong.
        Invalid: a picture is missing, too large or not one.
    """
    fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    try:
        body = EditBody.model_validate_strings(fields, strict=False)
    except ValidationError as e:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in e.errors()]) from e
    asked = asked_by_openai(body, api.limits, timeout)
    files: dict[str, UploadFile] = {}
    for name, file in form.multi_items():
        if isinstance(file, UploadFile):
            _add_file(files, name.removesuffix("[]"), file)  # the official client's form of a list
    if "image" not in files:
        raise Invalid(
            "image is required", hint="send a file", param="image", code="missing_required_parameter"
        )
    pictures = {
        name: await api.encoder.run(
            read_upload, await file.read(), param=name, most_pixels=api.limits.max_pixels
        )
        for name, file in files.items()
    }
    return Edit(asked, pictures["image"], pictures.get("mask"))


def _add_file(files: dict[str, UploadFile], name: str, file: UploadFile) -> None:
    if name not in ("image", "mask"):
        raise Invalid(
            f"{name!r:.80} is not a file of this path",
            hint="send image, and mask if there is one",
            param=name[:80],
            code="unknown_parameter",
        )
    if name in files:
        raise Invalid(f"there are several files named {name}", hint="send one", param=name)
    files[name] = file


def _unreadable() -> Invalid:
    return Invalid(
        "the form cannot be read",
        hint=f"send multipart/form-data with at most {MOST_FILES} files",
        code="invalid_form",
    )
