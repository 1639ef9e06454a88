"""What of Gradio's application can be reached, and by whom."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from ditc.runtime.serving.refusals import Invalid
from ditc.runtime.serving.ui.gate import POLICY, Gate
from ditc.runtime.serving.ui.visitors import Visitors

# Routes of Gradio 6.31 that read or write files, call functions, or ask other servers.
CLOSED = (
    "GET /gradio_api/file=/etc/passwd",
    "GET /gradio_api/file/etc/passwd",
    "GET /gradio_api/file=https://example.com/",
    "GET /gradio_api/proxy=https://example.com/",
    "GET /file=/etc/passwd",
    "POST /gradio_api/upload",
    "GET /gradio_api/upload_progress",
    "POST /gradio_api/run/predict",
    "POST /gradio_api/api/predict",
    "POST /gradio_api/call/draws",
    "POST /gradio_api/component_server",
    "GET /gradio_api/component_server/1/x/y",
    "GET /gradio_api/info",
    "GET /gradio_api/openapi.json",
    "GET /gradio_api/runs",
    "POST /gradio_api/run-history/connect",
    "GET /gradio_api/heartbeat/x",
    "GET /gradio_api/stream/x/y/1/playlist.m3u8",
    "POST /gradio_api/process_recording",
    "POST /gradio_api/vibe-edit",
    "GET /gradio_api/deep_link",
    "GET /config",
    "POST /login",
    "GET /monitoring",
    "GET /monitoring/summary",
    "GET /svelte/x.js",
    "GET /static/../../secret",
    "GET /static//etc/passwd",
    "GET /assets/%2e%2e/secret",
    "GET /custom_component/1/x/y/z",
    "PUT /",
    "POST /gradio_api/mcp/sse",
)


class Inner:
    """An application that answers everything and remembers it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.body = b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope)
        self.body = (await receive()).get("body", b"")
        headers = [(b"access-control-allow-origin", b"https://evil.example"), (b"content-type", b"text/html")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"inner"})


def ask(line: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], Inner]:
    """Status, headers and the application behind the gate."""
    method, _, target = line.partition(" ")
    path, _, query = target.partition("?")
    inner, sent = Inner(), []
    scope = {
        "type": "http",
        "method": method,
        "path": f"/ui{path}",
        "root_path": "/ui",
        "state": {"key_name": "alice"},
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }

    bodies = [body]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bodies.pop()} if bodies else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Gate(inner, Visitors(), start=lambda: None)(scope, receive, send))
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, inner


@pytest.mark.parametrize("line", CLOSED)
def test_a_path_that_the_page_does_not_need_is_not_there(line: str) -> None:
    status, _, inner = ask(line)
    assert status == 404 and inner.seen == []


def test_answers_forbid_what_other_sites_could_do_with_them() -> None:
    _, headers, _ = ask("GET /", origin="https://evil.example")
    assert headers["content-security-policy"] == POLICY
    assert not any(name.startswith("access-control") for name in headers)


def test_the_query_of_the_page_does_not_reach_gradio() -> None:
    _, _, inner = ask("GET /?deep_link=x&view=api")
    assert inner.seen[0]["query_string"] == b""


def test_gradio_gets_the_names_of_sessions_that_browsers_choose_and_no_others() -> None:
    """It keeps them, so a client could fill the memory with names of a megabyte."""
    body = json.dumps({"session_hash": "0a1b2c3d4e", "data": []}).encode()
    status, _, inner = ask("POST /gradio_api/queue/join", body)
    assert status == 200 and inner.body == body
    for name in ("a" * 65, "", "a b", 7, None, ["a"]):
        with pytest.raises(Invalid, match="session has no name"):
            ask("POST /gradio_api/queue/join", json.dumps({"session_hash": name}).encode())
    for broken in (b"", b"[]", b"{", b'{"session_hash"', b"[" * 100_000, b"\xff"):
        with pytest.raises(Invalid):
            ask("POST /gradio_api/queue/join", broken)
