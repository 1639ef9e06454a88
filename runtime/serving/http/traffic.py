"""Counts the requests that are being answered, and refuses new work while the server ends."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditc.runtime.serving.metrics import Metrics
from ditc.runtime.serving.refusals import Unavailable

# Methods that only read, or cancel. They are answered to the end, so that clients can fetch what is done.
_NO_WORK = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_METHODS = frozenset({*_NO_WORK, "POST", "PUT", "PATCH"})


@dataclass(eq=False)
class Traffic:
    """What the server is answering now. Only the event loop's thread changes it.

    Attributes:
        working: requests that may bring work and are not answered to their last byte.
        ending: whether new work is refused.
    """

    working: int = 0
    ending: bool = False


class CountTraffic:
    """The outermost layer: every answer is counted by its status."""

    def __init__(self, app: ASGIApp, traffic: Traffic, metrics: Metrics) -> None:
        self.app, self._traffic, self._metrics = app, traffic, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, status = scope["method"], "gone"

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        works = method not in _NO_WORK
        self._traffic.working += works
        try:
            await self.app(scope, receive, send_counted)
        finally:
            self._traffic.working -= works
            self._metrics.http.labels(method if method in _METHODS else "other", status).inc()


class RefuseAtEnd:
    """An inner layer, whose error the layers around it answer."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self.app, self._traffic = app, traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._traffic.ending and scope["method"] not in _NO_WORK:
            raise Unavailable("the server is shutting down", hint="come back later", retry_after=5.0)
        await self.app(scope, receive, send)
