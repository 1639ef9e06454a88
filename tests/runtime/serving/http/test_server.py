"""The socket that the server listens on, and the end of the server."""

from __future__ import annotations

import asyncio
import socket
import threading

from serving_thread import read_answer
from starlette.types import ASGIApp, Receive, Scope, Send

from ditc.runtime.serving.http.app import create_app
from ditc.runtime.serving.http.server import Server, ServerOptions, listen
from ditc.runtime.serving.http.traffic import Traffic
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.settings import Bounds

OPTIONS = ServerOptions(port=0, drain_seconds=20)


def server_of(app: ASGIApp | None = None) -> Server:
    models = Models({}, admission=Admission(Bounds()))
    return Server(create_app(models) if app is None else app, models, Traffic(), OPTIONS)


def test_answers_in_several_parts_are_not_held_back() -> None:
    """Each answer took 44 ms while connections waited for acknowledgements of its first part."""

    async def is_sent_at_once() -> int:
        connected: asyncio.Queue[socket.socket] = asyncio.Queue()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected.put_nowait(writer.get_extra_info("socket"))

        with listen(ServerOptions(port=0)) as listener:
            listener.listen()
            async with await asyncio.start_server(accept, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                accepted = await connected.get()
                found = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
        return found

    assert asyncio.run(is_sent_at_once())


def test_a_server_that_is_told_to_end_before_it_runs_ends() -> None:
    """A bundle that could not be opened at once left a server that was never ready."""
    server = server_of()
    server.end()
    with listen(OPTIONS) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        thread.join(20)
    assert not thread.is_alive()


def test_what_a_client_still_reads_is_sent_to_its_end() -> None:
    """Downloads that took longer were cut off a second after the last drawing."""
    begun = threading.Event()

    async def download(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"20")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(20):
            await send({"type": "http.response.body", "body": b".", "more_body": True})
            begun.set()
            await asyncio.sleep(0.15)
        await send({"type": "http.response.body", "body": b""})

    server = server_of(download)
    with listen(OPTIONS) as listener:
        address = listener.getsockname()
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert begun.wait(20)
            server.end()
            answer = read_answer(connection)
        assert answer is not None and answer.body == 20 * b"."
        thread.join(20)
    assert not thread.is_alive()
