"""Bounds of what comes in: requests at one time, and their bodies, which are read whole before anything parses them."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditc.runtime.serving.http.access import OPEN_PATHS
from ditc.runtime.serving.http.transport_limits import TransportLimits
from ditc.runtime.serving.refusals import Overloaded, Refusal

# Where forms with pictures are uploaded. Every other body is JSON.
UPLOAD_PATHS = frozenset({"/v1/images/edits", "/v1/videos"})
UPLOAD_TYPE = b"multipart/form-data"
# A request that has no place is gone when another one ends, which may be soon.
RETRY = 1.0


class Incoming:
    """The layer of the application that counts requests and reads their bodies.

    It is below the one that asks for keys, so that nobody without one fills the memory. Paths that are open to all
    take no body, and are always answered.
    """

    def __init__(self, app: ASGIApp, limits: TransportLimits) -> None:
        self.app, self.limits = app, limits
        self.open_requests = self.buffered_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] in OPEN_PATHS:
            await self._with_body(scope, receive, send, most=0)
            return
        if self.open_requests >= self.limits.max_open_requests:
            raise Overloaded(
                f"the server answers {self.open_requests} requests already",
                hint="come back later",
                retry_after=RETRY,
            )
        self.open_requests += 1
        try:
            upload = scope["path"] in UPLOAD_PATHS and any(
                name == b"content-type" and value.strip().lower().startswith(UPLOAD_TYPE)
                for name, value in scope["headers"]
            )
            most = self.limits.max_upload_bytes if upload else self.limits.max_body_bytes
            await self._with_body(scope, receive, send, most=most)
        finally:
            self.open_requests -= 1

    async def _with_body(self, scope: Scope, receive: Receive, send: Send, *, most: int) -> None:
        """Call the application with a body that is there. Raises Refusal if it is too large or too late."""
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > most:
                raise _too_large(most)
        body, size = bytearray(), 0
        try:
            try:
                async with asyncio.timeout(self.limits.body_timeout):
                    whole = await self._read(receive, body, most)
            except TimeoutError:
                raise Refusal(
                    f"the body did not arrive within {self.limits.body_timeout:g} s",
                    status=408,
                    code="body_timeout",
                ) from None
            if whole:  # else the client has gone away
                size, again = len(body), _replay(bytes(body), receive)
                body.clear()  # what is counted once is in memory once
                await self.app(scope, again, send)
        finally:
            self.buffered_bytes -= size or len(body)

    async def _read(self, receive: Receive, body: bytearray, most: int) -> bool:
        """Append what comes to the body. False if the client went away."""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return False
            part = message.get("body", b"")
            if len(body) + len(part) > most:
                raise _too_large(most)
            if self.buffered_bytes + len(part) > self.limits.max_buffered_bytes:
                raise Overloaded(
                    "the server has no memory left for this body", hint="come back later", retry_after=RETRY
                )
            self.buffered_bytes += len(part)
            body += part
            if not message.get("more_body", False):
                return True


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body, and then waits for the client to go away."""
    given = False

    async def receive_again() -> Message:
        nonlocal body, given
        if given:
            return await receive()
        message: Message = {"type": "http.request", "body": body, "more_body": False}
        body, given = b"", True
        return message

    return receive_again


def _too_large(most: int) -> Refusal:
    return Refusal(
        f"the body has more than {most} bytes", hint="send less", status=413, code="body_too_large"
    )
