"""Of the routes of the Gradio that is installed, only those that the page needs can be reached."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from served_page import Site
from starlette.testclient import TestClient

from ditc.runtime.serving.api.request_limits import RequestLimits
from ditc.runtime.serving.http.app import create_app
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.ui.gate import OPEN, Gate
from ditc.runtime.serving.ui.visitors import MOST_UNREAD, MOST_VISITS

pytest.importorskip("gradio", reason="the page needs gradio: make test-ui has it")

NEEDED = {
    "GET /",
    "GET /assets/{path:path}",
    "GET /favicon.ico",
    "GET /gradio_api/app_id",
    "GET /gradio_api/queue/data",
    "GET /static/{path:path}",
    "GET /theme.css",
    "POST /gradio_api/queue/join",
}


def all_routes(app: Any) -> list[Any]:
    """The routes of an application and of the routers in it."""
    routers = [route.original_router for route in app.routes if hasattr(route, "original_router")]
    return [route for router in (app, *routers) for route in router.routes if hasattr(route, "methods")]


def test_only_what_the_page_needs_is_open(tiny_bundle: Path) -> None:
    """A new version of Gradio may have new routes. They stay closed until somebody has looked at them."""
    from ditc.runtime.serving.ui.page import add_page

    models = Models({"tiny": tiny_bundle}, admission=Admission(Bounds()))
    app = create_app(models)
    add_page(app, models, limits=RequestLimits())
    for path in ("/", "/ui"):  # the address that `ditc serve` prints leads to the page too
        answer = TestClient(app, base_url="http://127.0.0.1").get(path, follow_redirects=False)
        assert (answer.status_code, answer.headers.get("location")) == (307, "/ui/")
    (gate,) = (route.app for route in app.routes if isinstance(getattr(route, "app", None), Gate))
    routes = [f"{method} {route.path}" for route in all_routes(gate._app) for method in route.methods or ()]
    assert len(routes) > 60
    filled = {route: re.sub(r"\{\w+(:path)?\}", "x", route) for route in routes}
    assert {route for route, line in filled.items() if OPEN.fullmatch(line)} == NEEDED


def test_the_page_keeps_no_state_of_its_visitors(tiny_bundle: Path) -> None:
    from ditc.runtime.serving.ui.page import layout
    from ditc.runtime.serving.ui.visitors import Visitors

    blocks = layout(Models({"tiny": tiny_bundle}, admission=Admission(Bounds())), RequestLimits(), Visitors())
    assert not blocks.analytics_enabled and not blocks.api_open
    assert blocks._queue.max_size is not None
    for kept in (blocks._queue.pending_event_ids_session, blocks._queue.pending_messages_per_session):
        assert kept.max_size == MOST_VISITS
    assert not [
        block
        for block in blocks.blocks.values()
        if type(block).__name__ in ("State", "File", "Gallery", "Image")
    ]


def test_what_nobody_reads_is_bounded(site: Site) -> None:
    """Gradio keeps answers and names of sessions until somebody reads them."""

    def join(session: str) -> tuple[int, str]:
        body = {"session_hash": session, "fn_index": 1, "data": []}  # cancel
        request = urllib.request.Request(
            f"{site.url}/ui/gradio_api/queue/join",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, ""
        except urllib.error.HTTPError as e:
            with e:
                return e.code, json.loads(e.read())["error"]["code"]

    assert join("a" * 500_000) == (400, "invalid_value")
    assert [join("reader") for _ in range(MOST_UNREAD + 1)] == [(200, "")] * MOST_UNREAD + [
        (429, "overloaded")
    ]
    with urllib.request.urlopen(
        f"{site.url}/ui/gradio_api/queue/data?session_hash=reader", timeout=20
    ) as events:
        assert events.read().count(b"process_completed") == MOST_UNREAD
    assert join("reader") == (200, "")
