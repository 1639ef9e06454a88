"""uvicorn's HTTP/1.1 protocol with bounds on everything that a client does before its request is known.

    slow or endless headers       a deadline, and a bound of bytes
    ambiguous requests            refused, as a proxy in front may read them in another way
    a body that nobody reads      thrown away for a moment, so that the answer arrives, and then cut off
    an answer that nobody reads   a deadline
    a large answer                given out in parts, of which the next waits for the client
    very many connections         the one that has been idle longest makes place; one whose client does
                                  not read is idle, too

Everything here is about one connection. What requests may do is decided by the layers of the application.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import socket
from contextlib import suppress
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from ditc.runtime.serving.http.errors import body_of, headers_of
from ditc.runtime.serving.http.request_ids import new_id
from ditc.runtime.serving.http.transport_limits import TransportLimits
from ditc.runtime.serving.refusals import Overloaded, Refusal

log = logging.getLogger(f"{__name__}.uvicorn")
log.setLevel(logging.ERROR)

# Seconds in which a client can read why its body was refused, while it is still sending it.
LINGER = 2.0
# Pieces of one body. Each costs about 20 us however small it is, and clients send kilobytes.
MOST_PIECES = 20_000
# What of an answer is in a connection's buffer at a time. The deadline of writing is for so much, not for all of it.
PART_BYTES = 2**18


def uvicorn_settings(limits: TransportLimits) -> dict[str, Any]:
    """The arguments of `uvicorn.Config` with which a server keeps these limits."""
    return {
        "http": functools.partial(LimitedProtocol, connections=Connections(limits)),
        "ws": "none",
        "h11_max_incomplete_event_size": limits.max_header_bytes,
        "timeout_keep_alive": limits.keep_alive_timeout,
        "proxy_headers": False,  # whoever connects could name another address
        "server_header": False,
    }


class Connections:
    """All connections of a server."""

    def __init__(self, limits: TransportLimits) -> None:
        self.limits = limits
        self.open: set[LimitedProtocol] = set()
        self.idle: dict[LimitedProtocol, None] = {}  # the longest idle one first

    def admit(self, new: LimitedProtocol) -> bool:
        """Make place for one more, if need be. False if there is none."""
        if len(self.open) >= self.limits.max_connections:
            if not self.idle:
                return False
            oldest = next(iter(self.idle))
            self.remove(oldest)
            oldest.transport.abort()
        self.open.add(new)
        return True

    def remove(self, gone: LimitedProtocol) -> None:
        """Forget a connection. Nothing happens if it is unknown."""
        self.open.discard(gone)
        self.idle.pop(gone, None)


class StrictConnection(h11.Connection):
    """h11's state machine, which also refuses what it and a proxy could read in two ways."""

    pieces = 0
    too_long = False  # whether it was refused for the length of its headers

    def next_event(self) -> Any:
        """The next event. Raises RemoteProtocolError."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self.pieces = 0
                self._check(event)
            elif isinstance(event, h11.Data):
                self.pieces += 1
                if self.pieces > MOST_PIECES:
                    raise h11.RemoteProtocolError("a body in very many pieces")
        except h11.RemoteProtocolError as e:
            self.too_long = e.error_status_hint == 431
            raise
        return event

    def _check(self, request: h11.Request) -> None:
        if request.http_version not in (
            b"1.0",
            b"1.1",
        ):  # h11 takes every other number, and asks it for no Host
            raise h11.RemoteProtocolError("another version of HTTP")
        names = [name for name, _ in request.headers]
        size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
        if size > self._max_incomplete_event_size:  # h11 looks at incomplete headers only
            raise h11.RemoteProtocolError("the headers are too long", error_status_hint=431)
        if b"transfer-encoding" in names and (b"content-length" in names or request.http_version < b"1.1"):
            raise h11.RemoteProtocolError("the length of the body is ambiguous")


class LimitedProtocol(H11Protocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # uvicorn's lines about requests have their queries, and a logger of the root switches them on. It also warns of
        # every broken request, with which strangers could fill the log.
        self.access_log, self.logger = False, log
        self.app = in_parts(self.app)
        self.all, self.limits = connections, connections.limits
        self.conn: StrictConnection = StrictConnection(h11.SERVER, self.limits.max_header_bytes)
        self._deaf = False  # what still comes is thrown away
        self._header_deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    # --- what asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _notice_dead_peers(transport)
        if self.all.admit(self):
            self._look_at_state(started=True)
        else:
            self._refuse(
                Overloaded(
                    f"the server has {len(self.all.open)} connections, and all are in use",
                    hint="come back later",
                    status=503,
                    retry_after=1.0,
                )
            )

    def connection_lost(self, exc: Exception | None) -> None:
        self.all.remove(self)
        for deadline in (self._header_deadline, self._write_deadline):
            if deadline is not None:
                deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        super().data_received(data)
        self._look_at_state(started=True)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self.limits.write_timeout, self.transport.abort)
        self._look_at_state(started=False)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None
        self._look_at_state(started=False)

    # --- what uvicorn calls

    def on_response_complete(self) -> None:
        if not self.transport.is_closing() and self.conn.their_state is h11.SEND_BODY:
            self.server_state.total_requests += 1
            self._linger()
            return
        super().on_response_complete()
        self._look_at_state(started=False)
        self._close_in_time()

    def shutdown(self) -> None:
        if self._deaf:  # it has its answer, and h11 does not know of it
            self.transport.close()
        else:
            super().shutdown()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._close_in_time()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or in the middle of an answer only end the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        if self.conn.too_long:
            self._refuse(Refusal("the headers are too long", status=431, code="headers_too_large"))
        else:
            self._refuse(Refusal("this is not a valid HTTP request", status=400, code="invalid_http"))

    # --- helpers

    def _look_at_state(self, *, started: bool) -> None:
        """Note whether the connection is idle, and start or end the deadline of headers.

        One whose client does not read, or has its last answer, is idle too: it may not keep others out.

        Args:
            started: whether a request has begun to arrive, or must, as on a new connection.
        """
        ending = self._deaf or self.transport.is_closing()
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and not ending and not self.flow.write_paused:
            self.all.idle.pop(self, None)
        elif self in self.all.open:
            self.all.idle.setdefault(self)
        if answering or ending:
            if self._header_deadline is not None:
                self._header_deadline.cancel()
                self._header_deadline = None
        elif started and self._header_deadline is None:
            self._header_deadline = self.loop.call_later(self.limits.header_timeout, self.transport.abort)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer without the application, and end the connection."""
        body = json.dumps(body_of(refusal)).encode()
        headers = {
            **headers_of(refusal),
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": new_id(),
        }
        reason = {400: "Bad Request", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}
        lines = [f"HTTP/1.1 {refusal.status} {reason[refusal.status]}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self._linger()

    def _linger(self) -> None:
        """End the connection from this side, and throw away what the client still sends, for a moment.

        A connection that is closed with unread data is reset, and the client may lose the answer.
        """
        self._deaf = True
        self._look_at_state(started=False)
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            with suppress(OSError):  # the client has gone away in this moment
                self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.abort)

    def _close_in_time(self) -> None:
        """A connection that is being closed waits for the client to read the rest, but not for ever."""
        if self.transport.is_closing():
            self.loop.call_later(self.limits.write_timeout, self.transport.abort)


def in_parts(app: ASGIApp) -> ASGIApp:
    """The application with large bodies of answers sent in parts.

    asyncio copies all that it cannot send at once, so each client that reads slowly would hold a copy of a whole video.
    """

    async def parted(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_parts(message: Message) -> None:
            body = message.get("body", b"")
            if len(body) <= PART_BYTES:
                await send(message)
                return
            for start in range(0, len(body), PART_BYTES):
                end = start + PART_BYTES
                more = end < len(body) or message.get("more_body", False)
                await send({**message, "body": body[start:end], "more_body": more})
                await asyncio.sleep(0)  # a client that reads fast holds up no others

        await app(scope, receive, send_parts)

    return parted


def _notice_dead_peers(transport: asyncio.Transport) -> None:
    """A client whose machine is gone says nothing, and its drawing would go on."""
    connection = transport.get_extra_info("socket")
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
