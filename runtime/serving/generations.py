"""POST /v1/images/generations: pictures in one JSON answer, or as server-sent events."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from ditc.runtime.serving.answers import (
    CompletedEvent,
    ErrorAnswer,
    ImagesAnswer,
    PartialEvent,
    ProgressEvent,
)
from ditc.runtime.serving.api import api_of
from ditc.runtime.serving.asked import TIMEOUT_HEADER, asked_by_openai
from ditc.runtime.serving.bodies import images_answer
from ditc.runtime.serving.clients import EventStream, answer
from ditc.runtime.serving.idempotency import KEY_HEADER
from ditc.runtime.serving.ongoing import Shared
from ditc.runtime.serving.schemas import GenerationBody
from ditc.runtime.serving.streaming import KEEP_ALIVE_SECONDS, events_of

router = APIRouter()

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request is wrong; param names the argument."},
    401: {"model": ErrorAnswer, "description": "The key is missing or unknown."},
    404: {"model": ErrorAnswer, "description": "There is no such model, job or route."},
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    422: {"model": ErrorAnswer, "description": "The idempotency key was used for another request."},
    429: {"model": ErrorAnswer, "description": "There is too much work; retry-after says when to come back."},
    500: {"model": ErrorAnswer, "description": "The picture could not be drawn."},
    503: {"model": ErrorAnswer, "description": "The server or the model is not ready."},
    504: {"model": ErrorAnswer, "description": "The timeout cannot be met, or has passed."},
}
EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "string",
            "description": f"With stream: events {ProgressEvent.model_fields['type'].default}, "
            f"{PartialEvent.model_fields['type'].default}, {CompletedEvent.model_fields['type'].default} and error.",
        }
    }
}

TimeoutHeader = Annotated[
    str,
    Header(
        alias=TIMEOUT_HEADER,
        pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?$",
        description="Seconds after which the pictures are of no use; with the field timeout, the shorter one counts.",
    ),
]
KeyHeader = Annotated[
    str,
    Header(
        alias=KEY_HEADER,
        min_length=1,
        max_length=255,
        description="Requests with the same key and body get one drawing; another body with the same key gets 422.",
    ),
]


@router.post(
    "/v1/images/generations",
    response_model=ImagesAnswer,
    responses={200: {"description": "The pictures.", "content": EVENTS}, **ERRORS},
)
async def generate(
    http: Request, body: GenerationBody, timeout: TimeoutHeader = "", key: KeyHeader = ""
) -> Response:
    """Draw pictures.

    The work is cancelled if the client goes away, unless another request with its idempotency key waits for it.
    """
    api = api_of(http)
    asked = asked_by_openai(body, api.limits, timeout)
    shared = api.shared(http, asked, body)
    if not body.stream:
        return await answer(http, _plain(http, shared))
    return await answer(http, _streamed(http, shared))


async def _plain(http: Request, shared: Shared) -> Response:
    ongoing, _ = await shared.join()
    try:
        result = await ongoing.result()
        content = await api_of(http).encoder.run(images_answer, result)
    finally:
        shared.leave()
    return Response(content, media_type="application/json")


async def _streamed(http: Request, shared: Shared) -> Response:
    ongoing, first = await shared.join()  # refusals are answered with their status
    events = events_of(ongoing, api_of(http).encoder, reads_progress=first, keep_alive=KEEP_ALIVE_SECONDS)
    return EventStream(events, closed=shared.leave)
