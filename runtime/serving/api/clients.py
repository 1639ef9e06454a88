"""Answers end when their client goes away: what was done for it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

# nginx's status for a client that closed its connection. Nobody reads it, but logs and metrics count it.
GONE = 499


class ClientGone(Exception):
    """The client has closed its connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work for a client, which is cancelled if the client goes away.

    Args:
        receive: of a request whose body has been read.

    Raises:
        ClientGone: the client has gone away.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await one


async def answer(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The answer to a request, for which nothing more is done if its client goes away."""
    try:
        return await unless_gone(request.receive, work)
    except ClientGone:
        return Response(status_code=GONE)


class EventStream(Response):
    """Server-sent events.

    Args:
        closed: called once, when everything is sent or the client has gone away, even before the first event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], *, closed: Callable[[], None]) -> None:
        # Proxies such as nginx would otherwise collect the events.
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._closed = events, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with suppress(ClientGone):
                await unless_gone(receive, self._send_events(send))
        finally:
            self._closed()

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
