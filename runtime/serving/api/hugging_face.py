"""POST /hf/models/NAME: Hugging Face's text-to-image task, whose answer is the bytes of one picture.

    InferenceClient(model="http://127.0.0.1:8000/hf/models/NAME").text_to_image("a red heart")

The model is a part of the address, as on Hugging Face, because the body has no place for it.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request
from starlette.responses import Response

from ditc.runtime.serving.api.api import api_of
from ditc.runtime.serving.api.asked import Format, asked_by_hugging_face
from ditc.runtime.serving.api.bodies import drawn
from ditc.runtime.serving.api.clients import answer
from ditc.runtime.serving.api.encoding import MEDIA_TYPES
from ditc.runtime.serving.api.ongoing import Shared
from ditc.runtime.serving.api.openapi import CONTENT, ERRORS, KeyHeader, TimeoutHeader
from ditc.runtime.serving.api.schemas import HuggingFaceBody

router = APIRouter()

# What a picture's bytes do not say to a program without a decoder.
DETAILS_HEADER = "x-ditc"


@router.post(
    "/hf/models/{name:path}",
    response_class=Response,
    responses={
        **ERRORS,
        200: {
            "description": f"The bytes of a picture. The header {DETAILS_HEADER} has its seed and settings as JSON.",
            "content": CONTENT,
        },
    },
)
async def text_to_image(
    http: Request, name: str, body: HuggingFaceBody, timeout: TimeoutHeader = "", key: KeyHeader = ""
) -> Response:
    """Draw one picture, in the format that the header `accept` asks for: PNG unless it names JPEG or WebP."""
    api = api_of(http)
    form = _form(http.headers.get("accept", ""))
    asked = asked_by_hugging_face(body, api.limits, model=name, format=form, timeout_header=timeout)
    return await answer(http, _picture(lambda: api.shared(http, asked, body), form))


async def _picture(find: Callable[[], Shared], form: Format) -> Response:
    shared = find()  # and joined at once, before its last client can leave it
    ongoing, _ = await shared.join()
    try:
        result = await ongoing.result()
    finally:
        shared.leave()
    ((_, file),) = drawn(result)
    headers = {DETAILS_HEADER: result.details.model_dump_json(ensure_ascii=True)}
    return Response(file, media_type=MEDIA_TYPES[form], headers=headers)


def _form(accept: str) -> Format:
    for form, media_type in MEDIA_TYPES.items():
        if media_type in accept:
            return form
    return "png"
