"""What the OpenAPI document says of many routes: their errors, their headers, and answers that are pictures."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Header

from ditc.runtime.serving.api.answers import ErrorAnswer
from ditc.runtime.serving.api.asked import TIMEOUT_HEADER
from ditc.runtime.serving.api.encoding import MEDIA_TYPES, VIDEO_TYPES
from ditc.runtime.serving.api.idempotency import KEY_HEADER

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request is wrong; param names the argument."},
    401: {"model": ErrorAnswer, "description": "The key is missing or unknown."},
    403: {"model": ErrorAnswer, "description": "The key, or the page that sends this, may not do this."},
    404: {"model": ErrorAnswer, "description": "There is no such model, job or route."},
    408: {"model": ErrorAnswer, "description": "The body came too slowly."},
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    422: {"model": ErrorAnswer, "description": "The idempotency key was used for another request."},
    431: {"model": ErrorAnswer, "description": "The headers are too large."},
    429: {"model": ErrorAnswer, "description": "There is too much work; retry-after says when to come back."},
    500: {"model": ErrorAnswer, "description": "The picture could not be drawn."},
    503: {"model": ErrorAnswer, "description": "The server or the model is not ready."},
    504: {"model": ErrorAnswer, "description": "The timeout cannot be met, or has passed."},
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
CONTENT = dict.fromkeys(MEDIA_TYPES.values(), BINARY)
VIDEO_CONTENT = dict.fromkeys(VIDEO_TYPES.values(), BINARY)

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
