"""POST /v1/images/generations: pictures in one JSON answer, or as server-sent events."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from fastapi import APIRouter, Request
from starlette.responses import Response

from ditc.runtime.serving.api.answers import (
    CompletedEvent,
    ImagesAnswer,
    PartialEvent,
    ProgressEvent,
)
from ditc.runtime.serving.api.api import api_of
from ditc.runtime.serving.api.asked import Asked, asked_by_openai
from ditc.runtime.serving.api.bodies import images_answer
from ditc.runtime.serving.api.clients import EventStream, answer
from ditc.runtime.serving.api.ongoing import Shared
from ditc.runtime.serving.api.openapi import ERRORS, KeyHeader, TimeoutHeader
from ditc.runtime.serving.api.pictures import with_pictures
from ditc.runtime.serving.api.schemas import GenerationBody, StreamedBody
from ditc.runtime.serving.api.streaming import KEEP_ALIVE_SECONDS, events_of

router = APIRouter()

EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "string",
            "description": f"With stream: events {ProgressEvent.model_fields['type'].default}, "
            f"{PartialEvent.model_fields['type'].default}, {CompletedEvent.model_fields['type'].default} and error.",
        }
    }
}


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
    with ExitStack() as held:
        asked = await with_pictures(api, asked, body, held)
        return await drawn(http, asked, body)


async def drawn(http: Request, asked: Asked, body: StreamedBody, files: str = "") -> Response:
    """The answer with the pictures: one JSON document or, if the body says so, a stream of events.

    Args:
        files: as in `Api.shared`.
    """

    def shared() -> Shared:
        return api_of(http).shared(http, asked, body, files)

    return await answer(http, _streamed(http, shared) if body.stream else _plain(http, shared))


async def _plain(http: Request, find: Callable[[], Shared]) -> Response:
    shared = find()  # and joined at once, before its last client can leave it
    ongoing, _ = await shared.join()
    try:
        result = await ongoing.result()
        content = await api_of(http).encoder.run(images_answer, result)
    finally:
        shared.leave()
    return Response(content, media_type="application/json")


async def _streamed(http: Request, find: Callable[[], Shared]) -> Response:
    shared = find()
    ongoing, first = await shared.join()  # refusals are answered with their status
    events = events_of(ongoing, api_of(http).encoder, reads_progress=first, keep_alive=KEEP_ALIVE_SECONDS)
    return EventStream(events, closed=shared.leave)
