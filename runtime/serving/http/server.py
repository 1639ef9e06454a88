"""Runs the HTTP application with uvicorn until a signal ends it.

SIGTERM and SIGINT end it in order: new work is refused, what is in flight is answered, and what takes too long is
ended. A second signal ends it at once. SIGHUP opens rebuilt bundles and reads the keys again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from ditc.runtime.bundle.private_copy import remove_own
from ditc.runtime.errors import UsageError
from ditc.runtime.serving.http.access import Doorkeeper, reload_keys
from ditc.runtime.serving.http.traffic import Traffic
from ditc.runtime.serving.http.transport import uvicorn_settings
from ditc.runtime.serving.http.transport_limits import DEFAULTS as TRANSPORT
from ditc.runtime.serving.http.transport_limits import TransportLimits
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.settings import ServerOptions

log = logging.getLogger(__name__)

# The part of the time for ending that is kept for ending what is still in work, and at most how many seconds.
_RESERVE, _MOST_RESERVE = 0.3, 3.0
_LOOK_AGAIN = 0.05
_UNSERVED = "the bundle cannot be served"
DEFAULTS = ServerOptions()


def listen(options: ServerOptions) -> socket.socket:
    """A socket that is bound to the address, so that a port that is in use is found before a bundle is loaded.

    Raises:
        UsageError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as e:
        raise UsageError(
            f"the host {options.host!r} is unknown", hint="give --host an address or a name"
        ) from e
    # asyncio turns Nagle's algorithm off only for sockets whose protocol is named. With it, an answer in two parts
    # waits 40 ms for the client's delayed acknowledgement of the first.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        listener.listen()
    except OSError as e:
        listener.close()
        raise UsageError(
            f"cannot listen on {options.host} port {options.port}: {e.strerror or e}",
            hint="choose another --port, or 0 for one that is free",
        ) from e
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of the address that the socket is bound to."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def end_at_once(code: int) -> NoReturn:
    """End the process although threads are inside of libraries, which must not be taken down around them."""
    sys.stdout.flush()
    sys.stderr.flush()
    remove_own()
    os._exit(code)


class Server(uvicorn.Server):
    """uvicorn with our way of ending. `run` returns when all is answered and closed.

    Attributes:
        closed: whether all models were closed at the end. If not, threads still compute.
    """

    def __init__(
        self,
        app: ASGIApp,
        models: Models,
        traffic: Traffic,
        options: ServerOptions = DEFAULTS,
        *,
        transport: TransportLimits = TRANSPORT,
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        reserve = min(_RESERVE * options.drain_seconds, _MOST_RESERVE)
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                timeout_graceful_shutdown=1,
                **uvicorn_settings(transport),
            )
        )
        self.closed = True
        self._models, self._traffic = models, traffic
        self._doorkeeper = doorkeeper
        self._drain_seconds, self._reserve = options.drain_seconds - reserve, reserve
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._unserved = False  # whether `end` was called, which may be before there is a loop

    def end(self) -> None:
        """End in order, from any thread, also if the server has not begun yet."""
        self._unserved = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_to_end, _UNSERVED)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's way, which closes its sockets first and raises the signal again at its end."""
        self._loop = loop = asyncio.get_running_loop()

        def on_signal(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._on_signal, signal.Signals(number))

        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
        here = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, on_signal) for number in numbers if here}
        if self._unserved:
            self._begin_to_end(_UNSERVED)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: signal.Signals) -> None:
        if number not in (signal.SIGTERM, signal.SIGINT):
            self._reload()
            return
        if self._ending is not None:
            log.warning("a second signal ends the server at once")
            end_at_once(128 + number)
        self._begin_to_end(number.name)

    def _begin_to_end(self, why: str) -> None:
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end_in_order(why))

    async def _end_in_order(self, why: str) -> None:
        traffic, models = self._traffic, self._models
        traffic.ending = True
        log.info("%s: answering %d requests in flight", why, max(traffic.working, models.admission.requests))
        end = monotonic() + self._drain_seconds
        while (traffic.working or not models.idle) and monotonic() < end:
            await asyncio.sleep(_LOOK_AGAIN)
        if not models.idle:
            log.warning("%d requests were not done in time, and are ended", models.admission.requests)
        self.closed = await asyncio.to_thread(models.close, self._reserve / 3)
        # What clients still read, such as a finished video, is answered too.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(end - monotonic()))
        self.should_exit = True

    def _reload(self) -> None:
        """Read the keys again, and open rebuilt bundles, on a thread, as that takes its time."""

        def reload() -> None:
            if self._doorkeeper is not None:
                reload_keys(self._doorkeeper)
            for name, what in self._models.reload().items():
                log.info("reload: %s %s", name, what)

        log.info("SIGHUP: looking for rebuilt bundles")
        threading.Thread(target=reload, name="ditc-reload", daemon=True).start()
