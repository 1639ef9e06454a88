"""Lets through only what the page needs of Gradio's application, which has many more routes.

Gradio can also receive and serve files, run functions by name, relay requests to other servers and talk to a code
assistant. The page uses none of it, so those paths do not exist here: its pictures travel inside of events. Who may
come in at all, and from which sites, was decided before (`access.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditc.runtime.serving.http.errors import answer
from ditc.runtime.serving.refusals import Invalid, Overloaded
from ditc.runtime.serving.ui.visitors import SECONDS_TO_OPEN_A_STREAM, Visitors

PAGE = "/"
EVENTS = "/gradio_api/queue/data"
JOIN = "/gradio_api/queue/join"
# Gradio keeps the names of sessions, which browsers choose: a dozen letters and digits.
SESSION = re.compile(r"[a-zA-Z0-9]{1,64}")
OPEN = re.compile(
    r"GET (/|/theme\.css|/favicon\.ico|/(assets|static)(/[\w-][\w.-]*)+|/gradio_api/(queue/data|app_id))"
    r"|POST /gradio_api/queue/join"
)
# The browser itself refuses what the page would load from elsewhere. Gradio's scripts compile handlers with eval.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)


class Gate:
    """An ASGI application around Gradio's.

    Args:
        start: starts Gradio's queue. It needs the event loop that serves the page.
    """

    def __init__(self, app: ASGIApp, visitors: Visitors, start: Callable[[], None]) -> None:
        self._app, self._visitors, self._start = app, visitors, start
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if not self._started:
            self._started = True
            self._start()
        path = scope["path"].removeprefix(scope.get("root_path", "")) or PAGE
        if not OPEN.fullmatch(f"{scope['method']} {path}"):
            await answer(HTTPException(404))(scope, receive, send)
        elif path == EVENTS:
            session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
            with self._visitors.streaming(visit_of(scope, session)):
                await self._app(scope, receive, guarded(send))
        else:
            if path == JOIN:
                receive = await self._asked(scope, receive)
            # Gradio's page restores saved states and runs other modes by its query.
            await self._app({**scope, "query_string": b""}, receive, guarded(send))

    async def _asked(self, scope: Scope, receive: Receive) -> Receive:
        """Gives the same body again, which asks for pictures or other settings.

        Raises:
            Invalid: its session has no name as browsers choose them.
            Overloaded: the visit does not read what it asks for.
        """
        first = await receive()  # the whole body, see `Incoming`
        try:
            session = json.loads(first.get("body", b""))["session_hash"]
        except (ValueError, LookupError, TypeError, RecursionError):
            session = None
        if not (isinstance(session, str) and SESSION.fullmatch(session)):
            raise Invalid("the page's session has no name", hint="load the page again", param="session_hash")
        if not self._visitors.may_ask(visit_of(scope, session)):
            raise Overloaded(
                "the page reads no answers", hint="load it again", retry_after=SECONDS_TO_OPEN_A_STREAM
            )
        given = [first]

        async def again() -> Message:
            return given.pop() if given else await receive()

        return again


def visit_of(scope: Scope, session: str) -> str:
    """The name of a visit. Browsers choose the name of their session, so it counts only for one key."""
    return f"{scope['state']['key_name']} {session}"


def guarded(send: Send) -> Send:
    """Adds the policy to an answer, and takes out what would allow other sites to read it."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name in [name for name in headers if name.startswith("access-control-")]:
                del headers[name]
            headers["content-security-policy"] = POLICY
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "no-referrer"
        await send(message)

    return wrapped
