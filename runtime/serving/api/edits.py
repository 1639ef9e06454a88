"""POST /v1/images/edits: pictures drawn from other pictures, in OpenAI's multipart form.

OpenAI's masks, and its pictures without a mask, are transparent where to draw anew. A mask without transparency is read
as diffusers reads one: white is drawn anew. The control picture of a ControlNet, which OpenAI does not have, is a third
file of the form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastapi import APIRouter, Request
from PIL import Image, ImageOps
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ditc.runtime.image_input import given_images
from ditc.runtime.serving.api.answers import ImagesAnswer
from ditc.runtime.serving.api.api import Api, api_of
from ditc.runtime.serving.api.asked import Asked, asked_by_openai
from ditc.runtime.serving.api.clients import GONE
from ditc.runtime.serving.api.control import control_fields
from ditc.runtime.serving.api.forms import MULTIPART, Form, checked_body, read_form
from ditc.runtime.serving.api.generations import drawn
from ditc.runtime.serving.api.openapi import ERRORS, TimeoutHeader
from ditc.runtime.serving.api.schemas import EditBody
from ditc.runtime.serving.api.uploads import Upload, read_upload
from ditc.runtime.serving.refusals import Invalid

router = APIRouter()

# The picture, its mask and the picture that a ControlNet reads.
FILES = ("image", "mask", "control_image")
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {
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
        form = await read_form(http, files=FILES, most_fields=len(EditBody.model_fields))
    except ClientDisconnect:
        return Response(status_code=GONE)
    api = api_of(http)
    edit = await _read(api, form, timeout)
    return await drawn(
        http, api.shared(http, edit.asked, edit.body, edit.files), stream=bool(edit.body.stream)
    )


async def _read(api: Api, form: Form, timeout: str) -> Edit:
    """The fields and pictures of a form.

    Raises:
        RequestValidationError: a field is unknown, missing or wrong.
        Invalid: a picture is missing, too large or not one.
    """
    body = checked_body(lambda: EditBody.model_validate_strings(form.fields, strict=False))
    asked = asked_by_openai(body, api.limits, timeout)
    required = "image" if "mask" in form.files or "control_image" not in form.files else "control_image"
    if required not in form.files:
        raise Invalid(
            f"{required} is required", hint="send a file", param=required, code="missing_required_parameter"
        )
    pictures: dict[str, Upload] = {}
    for name, content in form.files.items():
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
    return Edit(replace(asked, request=request), body, form.digest)


def _to_draw(image: Upload, mask: Upload | None) -> Image.Image | None:
    """Where to draw, as white in a picture of grey; None for everywhere."""
    if mask is not None and mask.alpha is None:
        return mask.image.convert("L")
    alpha = image.alpha if mask is None else mask.alpha
    return None if alpha is None else ImageOps.invert(alpha)
