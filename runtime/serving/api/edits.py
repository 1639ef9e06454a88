"""POST /v1/images/edits: pictures drawn from other pictures, in OpenAI's multipart form.

OpenAI's masks, and its pictures without a mask, are transparent where to draw anew. A mask without transparency is read
as diffusers reads one: white is drawn anew. The control picture of a ControlNet, which OpenAI does not have, is a third
file of the form.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from PIL import Image, ImageOps
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ditc.runtime.image_input import given_images
from ditc.runtime.serving.api.answers import ImagesAnswer
from ditc.runtime.serving.api.api import Api, api_of
from ditc.runtime.serving.api.asked import Asked, asked_by_openai
from ditc.runtime.serving.api.clients import GONE
from ditc.runtime.serving.api.control import control_fields
from ditc.runtime.serving.api.generations import drawn
from ditc.runtime.serving.api.openapi import ERRORS, TimeoutHeader
from ditc.runtime.serving.api.schemas import EditBody
from ditc.runtime.serving.api.uploads import Upload, read_upload
from ditc.runtime.serving.refusals import Invalid

router = APIRouter()

# The picture, its mask and the picture that a ControlNet reads.
FILES = ("image", "mask", "control_image")
MOST_FILES = len(FILES)
MOST_FIELD_BYTES = 2**20
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["prompt"],
                    "properties": {
                        "image": {
                            "type": "string",
                            "format": "binary",
                            "description": "PNG, JPEG or WebP. Only a control_image can stand without it.",
                        },
                        "control_image": {
                            "type": "string",
                            "format": "binary",
                            "description": "What the bundle's ControlNet reads, such as edges.",
                        },
                        "mask": {
                            "type": "string",
                            "format": "binary",
                            "description": "Where to draw anew: where it is transparent or, if it is opaque, white.",
                        },
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
    """A checked request to draw from a picture.

    Attributes:
        files: the hash of the pictures.
    """

    asked: Asked
    body: EditBody
    files: str


@router.post(
    "/v1/images/edits",
    response_model=ImagesAnswer,
    openapi_extra=FORM,
    responses=ERRORS,
)
async def edit(http: Request, timeout: TimeoutHeader = "") -> Response:
    """Draw from a picture, everywhere or where the mask says, or after a control picture."""
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
    api = api_of(http)
    try:
        edit = await _read(api, form, timeout)
    finally:
        await form.close()
    return await drawn(
        http, api.shared(http, edit.asked, edit.body, edit.files), stream=bool(edit.body.stream)
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
    required = "image" if "mask" in files or "control_image" not in files else "control_image"
    if required not in files:
        raise Invalid(
            f"{required} is required", hint="send a file", param=required, code="missing_required_parameter"
        )
    pictures: dict[str, Upload] = {}
    digest = hashlib.sha256()
    for name, file in files.items():
        content = await file.read()
        digest.update(f"{name} {len(content)}\n".encode() + content)
        pictures[name] = await api.encoder.run(
            read_upload, content, param=name, most_pixels=api.limits.max_pixels
        )
    image, control = pictures.get("image"), pictures.get("control_image")
    request = replace(
        asked.request,
        image=image and given_images("image", image.image, channels=3),
        mask_image=image and _to_draw(image, pictures.get("mask")),
        strength=body.strength,
        **control_fields(body, control),
    )
    return Edit(replace(asked, request=request), body, digest.hexdigest())


def _to_draw(image: Upload, mask: Upload | None) -> Image.Image | None:
    """Where to draw, as white in a picture of grey; None for everywhere."""
    if mask is not None and mask.alpha is None:
        return mask.image.convert("L")
    alpha = image.alpha if mask is None else mask.alpha
    return None if alpha is None else ImageOps.invert(alpha)


def _add_file(files: dict[str, UploadFile], name: str, file: UploadFile) -> None:
    if name not in FILES:
        raise Invalid(
            f"{name!r:.80} is not a file of this path",
            hint=f"send {', '.join(FILES)}",
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
