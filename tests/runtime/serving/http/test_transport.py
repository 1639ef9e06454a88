"""Whatever a client does to its connection, it gets an answer or is cut off, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import resource
import socket
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, replace

import pytest
from serving_thread import ServerThread, read_answer, server_thread
from starlette.types import ASGIApp, Receive, Scope, Send

from ditc.runtime.errors import UsageError
from ditc.runtime.serving.http import transport
from ditc.runtime.serving.http.incoming import Incoming
from ditc.runtime.serving.http.open_files import OTHER_FILES, with_open_files
from ditc.runtime.serving.http.transport_limits import TransportLimits

# Short enough for a test, long enough for a busy machine.
HASTY = TransportLimits(
    header_timeout=0.5, body_timeout=0.5, write_timeout=0.5, keep_alive_timeout=0.5, max_body_bytes=100_000
)
PATIENT = TransportLimits(header_timeout=600, keep_alive_timeout=600, body_timeout=600)
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def hasty() -> Iterator[ServerThread]:
    with server_thread(transport=HASTY) as server:
        yield server


def is_cut_off(connection: socket.socket) -> bool:
    """Whether the server closes the connection without an answer."""
    return read_answer(connection) is None


def answers_a_good_client(server: ServerThread) -> bool:
    return server.ask("GET", "/v1/models").status == 200 and server.ask("GET", "/livez").status == 200


# --- slow clients


@pytest.mark.parametrize("sent", [b"", b"GET /v1/models HT", GET[:-2]])
def test_headers_that_do_not_end_are_cut_off(hasty: ServerThread, sent: bytes) -> None:
    with hasty.connect() as connection:
        connection.sendall(sent)
        assert answers_a_good_client(hasty)
        assert is_cut_off(connection)


def test_a_byte_now_and_then_does_not_extend_the_deadline(hasty: ServerThread) -> None:
    with hasty.connect() as connection:
        connection.sendall(GET)
        assert read_answer(connection).status == 200
        began = time.monotonic()
        with pytest.raises(OSError):
            for _ in range(200):  # the second request of the connection
                connection.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() - began < 5


def test_an_idle_connection_is_closed_in_time(hasty: ServerThread) -> None:
    with hasty.connect() as connection:
        connection.sendall(GET)
        assert read_answer(connection).status == 200
        assert is_cut_off(connection)


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 50\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}"]
)
def test_a_body_that_does_not_end_is_answered_with_408(hasty: ServerThread, framing: bytes) -> None:
    answer = hasty.raw(POST + framing)
    assert (answer.status, answer.error["code"]) == (408, "body_timeout")
    assert answer.headers["x-should-retry"] == "false"


def test_an_answer_that_nobody_reads_is_cut_off() -> None:
    written = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done():
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
            written.append(1)
            await asyncio.sleep(0)

    with server_thread(app, transport=HASTY) as server, server.connect() as connection:
        connection.sendall(GET)
        wait_until(lambda: written and not server.server.server_state.connections)
        assert len(written) < 200  # what the system buffers, and no more


def large_answer(size: int) -> ASGIApp:
    """An application that answers with so many bytes at once, as with a video."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        length = (b"content-length", str(size).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": bytes(size)})

    return app


def test_a_large_answer_may_take_longer_than_a_client_may_pause() -> None:
    size, hasty = 24 * 2**20, replace(HASTY, write_timeout=1.0)
    with server_thread(large_answer(size), transport=hasty) as server, server.connect() as connection:
        connection.sendall(GET)
        began, got = time.monotonic(), 0
        while part := connection.recv(2**20):
            got += len(part)
            time.sleep(3 * len(part) / size)
            if got > size:
                break
        assert got > size, f"cut off after {got} bytes"
        assert time.monotonic() - began > 2 * hasty.write_timeout


def test_a_large_answer_that_waits_for_its_client_is_not_copied() -> None:
    with server_thread(large_answer(2**26), transport=PATIENT) as server, server.connect() as connection:
        connection.sendall(GET)
        connection.recv(1)
        (protocol,) = server.server.server_state.connections
        wait_until(lambda: protocol.flow.write_paused)  # type: ignore[union-attr]
        assert protocol.transport.get_write_buffer_size() < 2**20  # type: ignore[union-attr]


def wait_until(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# --- too much


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        GET[:-2] + b"x: " + b"a" * 20_000 + b"\r\n\r\n",
        GET[:-2] + b"x: y\r\n" * 5000 + b"\r\n",
        GET[:-2] + b"x: " + b"a" * 20_000,
        b"a" * 100_000,
    ],
)
def test_long_headers_are_refused(hasty: ServerThread, sent: bytes) -> None:
    answer = hasty.raw(sent)
    assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
    assert answer.headers["x-request-id"].startswith("req_")
    assert answers_a_good_client(hasty)


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [100_001, 5_000_000])
def test_a_body_above_the_bound_is_refused_before_it_is_parsed(hasty: ServerThread, size: int) -> None:
    body = b"[" * size
    whole = b"Content-Length: %d\r\n\r\n%s" % (size, body)
    for framed in (whole, b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, 5000)):
        answer = hasty.raw(POST + framed)
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    declared = hasty.raw(POST + b"Content-Length: 99999999999999999999\r\n\r\n{")
    assert declared.status in (400, 413)


def test_a_body_at_the_bound_is_read(hasty: ServerThread) -> None:
    body = b'{"prompt": "' + b"a" * (100_000 - 14) + b'"}'
    answer = hasty.raw(POST + b"Content-Length: 100000\r\n\r\n" + body)
    assert answer.status not in (408, 413)


def test_a_body_in_very_many_pieces_is_refused() -> None:
    with server_thread() as server:
        sent = POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b" " * (transport.MOST_PIECES + 1), 1)
        assert server.raw(sent).error["code"] == "invalid_http"


def test_paths_that_are_open_to_all_take_no_body(hasty: ServerThread) -> None:
    for framing in (
        b"Content-Length: 1\r\n\r\na",
        b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"abc", 1),
    ):
        assert hasty.raw(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + framing).status == 413


def test_memory_for_bodies_and_open_requests_are_counted_exactly() -> None:
    limits = TransportLimits(max_buffered_bytes=1000, max_open_requests=2)
    begun, layer = [], None

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append((await receive())["body"])
        await done.wait()

    layer, done = Incoming(inner, limits), asyncio.Event()

    async def ask(size: int) -> str:
        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": bytes(size), "more_body": False}

        try:
            await layer({"type": "http", "path": "/x", "headers": []}, receive, lambda message: None)
        except Exception as e:
            return str(e)
        return ""

    async def all_of_it() -> list[str]:
        tasks = [asyncio.ensure_future(ask(size)) for size in (600, 401)]
        await asyncio.sleep(0.01)
        tasks.append(asyncio.ensure_future(ask(400)))
        await asyncio.sleep(0.01)
        tasks.append(asyncio.ensure_future(ask(0)))
        await asyncio.sleep(0.01)
        assert (layer.open_requests, layer.buffered_bytes) == (2, 1000)
        done.set()
        return await asyncio.gather(*tasks)

    said = asyncio.run(all_of_it())
    assert said == [
        "",
        "the server has no memory left for this body",
        "",
        "the server answers 2 requests already",
    ]
    assert (layer.open_requests, layer.buffered_bytes) == (0, 0)


def test_a_body_is_in_memory_once_and_only_as_long_as_the_application_holds_it() -> None:
    size, held = 2**22, list[int]()

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert len(message["body"]) == size
        held.append(tracemalloc.get_traced_memory()[0])
        del message
        held.append(tracemalloc.get_traced_memory()[0])

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": bytes(size), "more_body": False}

    layer = Incoming(inner, TransportLimits(max_body_bytes=size))
    tracemalloc.start()
    try:
        asyncio.run(layer({"type": "http", "path": "/x", "headers": []}, receive, lambda message: None))
    finally:
        tracemalloc.stop()
    assert size <= held[0] < 1.5 * size and held[1] < 0.5 * size


# --- not HTTP, or HTTP that can be read in two ways


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"SSH-2.0-x\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET  /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        GET[:-2] + b"Host: other\r\n\r\n",
        GET[:-2] + b"x y: z\r\n\r\n",
        GET[:-2] + b"x : z\r\n\r\n",
        GET[:-2] + b"x: a\x00b\r\n\r\n",
        POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        POST + b"Content-Length: 2, 3\r\n\r\n{}",
        POST + b"Content-Length: +2\r\n\r\n{}",
        POST + b"Content-Length: -1\r\n\r\n{}",
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}xx",
    ],
)
def test_what_is_not_http_or_ambiguous_is_refused(hasty: ServerThread, sent: bytes) -> None:
    smuggled = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with hasty.connect() as connection:
        connection.sendall(sent + smuggled)
        answer = read_answer(connection)
        assert (answer.status, answer.error["code"]) == (400, "invalid_http")
        assert is_cut_off(connection)  # what follows is not answered
    assert answers_a_good_client(hasty)


def test_damaged_requests_are_answered_or_cut_off_and_leave_the_log_alone(
    hasty: ServerThread, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(11)
    body = b'{"prompt": "a", "model": "none"}'
    whole = [
        GET,
        POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body),
        POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, 7),
    ]
    statuses = set()
    with caplog.at_level(logging.WARNING):
        for _ in range(300):
            data = bytearray(rng.choice(whole))
            for _ in range(rng.randint(1, 4)):
                place, length = rng.randrange(len(data)), rng.choice((0, 1, 1, 5))
                data[place : place + length] = rng.choice((b"\r\n", b"\0", b"\xff", b":", b"9", b" ", b""))
            with hasty.connect() as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = read_answer(connection)
            statuses.add(None if answer is None else answer.status)
    assert 400 in statuses and not {status for status in statuses if status and status >= 500}
    assert not caplog.text
    assert answers_a_good_client(hasty)


def test_pipelined_requests_are_answered_in_order(hasty: ServerThread) -> None:
    with hasty.connect() as connection:
        paths = [b"/v1/models", b"/nothing", b"/livez", b"/v1/models"]
        connection.sendall(b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in paths))
        file = connection.makefile("rb")
        found = []
        for _ in paths:
            found.append(int(file.readline().split()[1]))
            while (line := file.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            file.read(length)
        assert found == [200, 404, 200, 200]


def test_a_broken_request_behind_a_good_one_ends_the_connection(hasty: ServerThread) -> None:
    with hasty.connect() as connection:
        connection.sendall(GET + b"\x00\x01\r\n\r\n")
        assert read_answer(connection).status == 200
    assert answers_a_good_client(hasty)


def test_a_client_that_sends_its_body_is_told_that_it_may_not(hasty: ServerThread) -> None:
    """The answer comes before the body does, and must not be lost when the connection ends."""
    for _ in range(5):
        with hasty.connect() as connection:
            connection.sendall(POST.replace(b"localhost", b"evil") + b"Content-Length: 3000000\r\n\r\n")
            for _ in range(30):
                connection.sendall(bytes(100_000))
            answer = read_answer(connection)
            assert answer.status == 403
            assert is_cut_off(connection)


# --- bodies that are not what they must be


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{"),
        ("application/json", b""),
        ("application/json", b"null"),
        ("application/json", b'"a"'),
        ("application/json", b"[" * 50_000),
        ("application/json", b'{"a":' * 15_000),
        ("application/json", b"[" * 900 + b"]" * 900),
        ("application/json", b"1" * 50_000),
        ("application/json", b'{"prompt": "\xff\xfe"}'),
        ("application/json", b'{"prompt": "\\ud800"}'),
        ("application/json", b'{"prompt": "a", "n": 1e999}'),
        ("application/json", b'{"prompt": "a", "n": NaN}'),
        ("application/json", '{"prompt": "a", "model": "none"}'.encode("utf-16")),
        ("text/plain", b'{"prompt": "a"}'),
        ("application/x-www-form-urlencoded", b"prompt=a"),
        ("multipart/form-data", b"prompt=a"),
        ("multipart/form-data; boundary=x", b"--x\r\n" * 5000),
        ("application/octet-stream", bytes(1000)),
        ("", b'{"prompt": "a"}'),
        ("application/json; charset=\xff", b'{"prompt": "a", "model": "none"}'),
        ("x" * 5000, b"{}"),
    ],
)
def test_a_wrong_body_is_refused_with_our_text(hasty: ServerThread, kind: str, body: bytes) -> None:
    answer = hasty.ask("POST", "/v1/images/generations", body, {"Content-Type": kind})
    assert 400 <= answer.status < 500 and answer.error["message"]
    for foreign in (b"Traceback", b"pydantic", b"Error", b"Expecting", b"site-packages"):
        assert foreign not in answer.body


# --- very many connections


def test_at_the_limit_the_connection_that_was_idle_longest_makes_place() -> None:
    with server_thread(transport=TransportLimits(max_connections=3)) as server, ExitStack() as stack:
        first, second, third = (stack.enter_context(server.connect()) for _ in range(3))
        for connection in (first, second, third, first):
            connection.sendall(GET)
            assert read_answer(connection).status == 200
        assert answers_a_good_client(server)
        assert is_cut_off(second)
        first.sendall(GET)
        assert read_answer(first).status == 200


def test_connections_in_use_are_not_given_up_for_new_ones() -> None:
    released = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while not released:
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    with server_thread(app, transport=TransportLimits(max_connections=2)) as server, ExitStack() as stack:
        busy = [stack.enter_context(server.connect()) for _ in range(2)]
        for connection in busy:
            connection.sendall(GET)
        wait_until(lambda: len(server.server.server_state.tasks) == 2)
        answer = server.raw(GET)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        released.append(1)
        assert [read_answer(connection).status for connection in busy] == [200, 200]


def test_connections_that_have_their_last_answer_make_place_too() -> None:
    with server_thread(transport=TransportLimits(max_connections=3)) as server, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(server.connect()).sendall(b"nonsense\r\n\r\n")
        assert answers_a_good_client(server)


def test_connections_whose_answer_nobody_reads_make_place_too() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        size = 2**26 if scope["path"] == "/large" else 1
        headers = [(b"content-length", b"%d" % size)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(size - 1), "more_body": True})
        await send({"type": "http.response.body", "body": b"."})

    with server_thread(app, transport=TransportLimits(max_connections=3)) as server, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(server.connect()).sendall(GET.replace(b"/v1/models", b"/large"))
        wait_until(lambda: sum(one.flow.write_paused for one in server.server.server_state.connections) == 3)
        assert server.raw(GET).status == 200


def test_a_server_ends_whatever_its_connections_are_doing() -> None:
    limits = TransportLimits(max_connections=5, header_timeout=600, keep_alive_timeout=600, body_timeout=600)
    with server_thread(transport=limits) as server, ExitStack() as stack:
        sent = [
            b"",
            GET[:-5],
            GET,
            POST + b"Content-Length: 9\r\n\r\n{",
            POST + b"Content-Length: 9999999\r\n\r\n{",
        ]
        connections = [stack.enter_context(server.connect()) for _ in sent]
        for connection, data in zip(connections, sent, strict=True):
            connection.sendall(data)
        assert read_answer(connections[-1]).status == 413  # and the rest of its body is thrown away
        for _ in range(2):
            stack.enter_context(server.connect()).sendall(b"nonsense\r\n\r\n")
        server.server.should_exit = True
        connections[3].sendall(b"        ")  # the one request in work is answered
        assert read_answer(connections[3]).status == 400
        wait_until(lambda: not server.server.server_state.connections)


def idle_connections(count: int, limit: int) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + limit + 500:
        pytest.skip(f"this process may open {soft} files")
    limits = TransportLimits(max_connections=limit, header_timeout=600, keep_alive_timeout=600)
    with server_thread(transport=limits) as server, ExitStack() as stack:
        for number in range(count):
            connection = stack.enter_context(server.connect())
            if number % 3 == 1:
                connection.sendall(GET[:-5])
            elif number % 3 == 2:
                connection.sendall(GET)
            if number % (count // 10) == 0:
                assert answers_a_good_client(server)
        assert answers_a_good_client(server)
        wait_until(lambda: len(server.server.server_state.connections) <= limit)


def test_two_thousand_idle_connections_leave_a_place_for_good_clients() -> None:
    idle_connections(2000, 100)


@pytest.mark.slow
def test_ten_thousand_idle_connections_leave_a_place_for_good_clients() -> None:
    idle_connections(10_000, 1024)


# --- the limits themselves


@pytest.mark.parametrize("name", [field.name for field in fields(TransportLimits)])
def test_limits_are_positive(name: str) -> None:
    for value in (0, -1, float("nan")):
        with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
            TransportLimits(**{name: value})


def test_the_process_may_open_enough_files_or_keeps_fewer_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: given.append(pair))
    assert with_open_files(TransportLimits(max_connections=3000)).max_connections == 3000
    assert with_open_files(TransportLimits(max_connections=10_000)).max_connections == 4096 - OTHER_FILES
    assert given == [(3000 + OTHER_FILES, 4096), (4096, 4096)]


def test_an_error_without_the_application_has_openais_body_too(hasty: ServerThread) -> None:
    answer = hasty.raw(b"nonsense\r\n\r\n")
    assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
    assert answer.headers["connection"] == "close"
