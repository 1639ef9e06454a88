"""POST /v1/images/edits: pictures drawn from other pictures, in OpenAI's multipart form.

The control picture of a ControlNet, which OpenAI does not have, is a third file of the form.
"""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ditc.runtime.serving.api.answers import ImagesAnswer
from ditc.runtime.serving.api.api import api_of
from ditc.runtime.serving.api.asked import asked_by_openai
from ditc.runtime.serving.api.clients import GONE
from ditc.runtime.serving.api.forms import MULTIPART, checked_body, read_form
from ditc.runtime.serving.api.generations import drawn
from ditc.runtime.serving.api.openapi import ERRORS, KeyHeader, TimeoutHeader
from ditc.runtime.serving.api.pictures import CONTROL, IMAGE, PICTURES, with_pictures
from ditc.runtime.serving.api.schemas import EditBody
from ditc.runtime.serving.refusals import Invalid

router = APIRouter()

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
                            "description": "PNG, JPEG or WebP; without a mask, it is drawn anew where it is "
                            "transparent. Only a control_image can stand without it.",
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


@router.post(
    "/v1/images/edits",
    response_model=ImagesAnswer,
    openapi_extra=FORM,
    responses=ERRORS,
)
async def edit(http: Request, timeout: TimeoutHeader = "", key: KeyHeader = "") -> Response:
    """Draw from a picture, everywhere or where the mask says, or after a control picture."""
    try:
        form = await read_form(http, files=PICTURES, most_fields=len(EditBody.model_fields))
    except ClientDisconnect:
        return Response(status_code=GONE)
    api = api_of(http)
    body = checked_body(lambda: EditBody.model_validate_strings(form.fields, strict=False))
    asked = asked_by_openai(body, api.limits, timeout)
    if not form.files.keys() & {IMAGE, CONTROL}:
        raise Invalid(
            f"{IMAGE} is required", hint="send a file", param=IMAGE, code="missing_required_parameter"
        )
    with ExitStack() as held:
        asked = await with_pictures(api, asked, body, held, form.files)
        return await drawn(http, asked, body, form.digest)
