"""A page served by a thread of the test, whose denoiser runs only as far as the test allows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from ditc.runtime.serving.api.request_limits import RequestLimits
from ditc.runtime.serving.http.access import doorkeeper_for
from ditc.runtime.serving.http.app import create_app
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.spec import DENOISER

PATIENCE = 20.0


class Pace:
    """Lets a session run only as often as the test allows."""

    def __init__(self, session: Any) -> None:
        self._run = session.run
        self.allowed = threading.Semaphore(0)
        session.run = self.run

    def run(self, *arguments: Any, **named: Any) -> Any:
        self.allowed.acquire()
        return self._run(*arguments, **named)


class Site:
    """A served page, and the denoiser behind it.

    Args:
        keys: a file of keys that visitors need.
    """

    def __init__(self, bundle: Path, keys: Path | None = None) -> None:
        pytest.importorskip("gradio", reason="the page needs gradio: make test-ui has it")
        from ditc.runtime.serving.ui.page import add_page

        self.models = Models({"tiny": bundle}, admission=Admission(Bounds()), warm_up_seconds=0.0)
        doorkeeper = doorkeeper_for("127.0.0.1", keys, browsers=True)
        app = create_app(self.models, doorkeeper=doorkeeper)
        add_page(app, self.models, limits=RequestLimits(max_prompt_bytes=32))
        config = uvicorn.Config(app, port=0, ws="none", http="h11", lifespan="off", log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with self.models.using() as model:
            self.scheduler = model.scheduler
            self.denoiser = Pace(model.pipeline.sessions[DENOISER])

    def break_connections(self) -> None:
        """Cut off all browsers, as a network does."""
        loop = self._server.servers[0].get_loop()
        for connection in list(self._server.server_state.connections):
            loop.call_soon_threadsafe(connection.transport.abort)

    def close(self) -> None:
        self.denoiser.allowed.release(10_000)
        self.models.close()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)


def until(condition: Callable[[], Any]) -> Any:
    """What the condition returns once it is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"it did not happen within {PATIENCE} s")
