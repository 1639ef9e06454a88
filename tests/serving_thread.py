"""The server's application and transport in a thread of the test, on a free port of the loopback interface."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from ditc.runtime.serving.http.access import Doorkeeper
from ditc.runtime.serving.http.app import create_app
from ditc.runtime.serving.http.transport import uvicorn_settings
from ditc.runtime.serving.http.transport_limits import DEFAULTS, TransportLimits
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission, Bounds


@dataclass(frozen=True)
class Answer:
    """What came back on a connection, as far as one answer goes."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


@dataclass(frozen=True)
class ServerThread:
    """A running server."""

    port: int
    server: uvicorn.Server

    def connect(self) -> socket.socket:
        """A new connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def raw(self, data: bytes) -> Answer | None:
        """Send these bytes on a new connection. None if it is closed without an answer."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_answer(connection, with_body=not data.startswith(b"HEAD "))

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request on a connection of its own."""
        fields = {"Host": "localhost", "Connection": "close", **(headers or {})}
        if body:
            fields["Content-Length"] = str(len(body))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        answer = self.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        assert answer is not None
        return answer


def read_answer(connection: socket.socket, *, with_body: bool = True) -> Answer | None:
    """The next answer on a connection. None if it was closed without one."""
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            part = connection.recv(65536)
            if not part:
                return None
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        while with_body and len(body) < int(headers.get("content-length", "0")):
            part = connection.recv(65536)
            if not part:
                return None
            body += part
    except ConnectionResetError:
        return None
    return Answer(int(first.split()[1]), headers, body)


@contextmanager
def server_thread(
    app: ASGIApp | None = None,
    *,
    models: Models | None = None,
    transport: TransportLimits = DEFAULTS,
    doorkeeper: Doorkeeper | None = None,
) -> Iterator[ServerThread]:
    """Serve an application, by default ditc's own over these or no models, until the end of the block."""
    if app is None:
        models = models or Models({}, admission=Admission(Bounds()))
        app = create_app(models, transport=transport, doorkeeper=doorkeeper)
    config = uvicorn.Config(app, lifespan="off", log_config=None, **uvicorn_settings(transport))
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(2048)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield ServerThread(listener.getsockname()[1], server)
        finally:
            server.should_exit = server.force_exit = True
            thread.join(20)
            assert not thread.is_alive()
