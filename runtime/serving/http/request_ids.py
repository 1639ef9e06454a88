"""The outermost layer of the application: every request has an id, and every exception an answer."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterable
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditc.runtime.printable import one_line
from ditc.runtime.serving.http.errors import answer

log = logging.getLogger(__name__)

HEADER = b"x-request-id"
# Ids end up in logs, so a client's own must be short and plain.
_PLAIN = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestIds:
    """Gives `scope["state"]["request_id"]`, answers what the layers below raise, and logs one line per request.

    The id is the client's if that is short and plain, so two requests may have the same. It is for logs, not for
    finding things.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        id = request_id(scope["headers"])
        scope.setdefault("state", {})["request_id"] = id
        status, began = 0, monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != HEADER]
                nosniff = (b"x-content-type-options", b"nosniff")
                message = {**message, "headers": [*headers, nosniff, (HEADER, id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as e:
            response = answer(e, request_id=id)  # logs what is not for clients
            if status == 0:
                await response(scope, receive, send_with_id)
        finally:
            log.info(
                "%s %s %s key=%s id=%s %.0f ms",
                one_line(scope["method"])[:20],
                one_line(scope["path"])[:200],  # without the query, which may hold a prompt
                status or "gone",
                scope["state"].get("key_name", "-"),
                id,
                1000 * (monotonic() - began),
            )


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's id if it sent one that is short and plain, else a new one."""
    sent = [value for name, value in headers if name == HEADER]
    if len(sent) == 1 and _PLAIN.fullmatch(sent[0]):
        return sent[0].decode()
    return new_id()


def new_id() -> str:
    """An id that no other request has."""
    return f"req_{uuid.uuid4().hex}"
