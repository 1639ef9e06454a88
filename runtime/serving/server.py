"""Runs the HTTP application with uvicorn until a signal ends it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from ditc.runtime.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where the server listens.

    Attributes:
        port: 0 takes one that is free.
    """

    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port {self.port} does not exist", hint="choose one from 1 to 65535, or 0")


DEFAULTS = ServerOptions()


def listen(options: ServerOptions) -> socket.socket:
    """A socket that is bound to the address, so that a port that is in use is found before a bundle is loaded.

    Raises:
        UsageError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    except OSError as e:
        listener.close()
        raise UsageError(
            f"cannot listen on {options.host} port {options.port}: {e.strerror or e}",
            hint="choose another --port, or 0 for one that is free",
        ) from e
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL that clients on this machine use."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, listener: socket.socket, *, started: Callable[[], None]) -> None:
    """Answer requests until a signal ends the server.

    Args:
        started: called before the first request is answered.
    """
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False
    )
    started()
    _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's own server raises the signal again at its end, and the exit code would say that it was killed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        yield
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _end(self) -> None:
        self.should_exit = True
