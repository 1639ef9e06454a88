"""What supervisors and operators are told: when the server can draw, why it cannot, and what a reload did."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ditc.runtime.load_options import LoadOptions
from ditc.runtime.request import Request
from ditc.runtime.serving.http.access import LocalPrograms
from ditc.runtime.serving.http.health import health_routes
from ditc.runtime.serving.http.traffic import Traffic
from ditc.runtime.serving.metrics import Metrics
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Refusal
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.scheduling.batches import Batches
from ditc.runtime.serving.scheduling.job import Event, Finished, Refused
from ditc.runtime.serving.settings import Bounds

REQUEST = Request(prompt="red cat", num_inference_steps=3, height=64, width=64, seed=3, output_type="pil")


class Asked:
    """The routes over a model, without HTTP."""

    def __init__(self, models: Models) -> None:
        self.models, self.traffic = models, Traffic()
        routes = health_routes(models, Metrics(), self.traffic, LocalPrograms()).routes
        self._endpoints: dict[str, Any] = {route.path: route.endpoint for route in routes}  # type: ignore[attr-defined]

    def ready(self) -> tuple[int, str, dict[str, Any]]:
        answer = asyncio.run(self._endpoints["/readyz"]())
        body = json.loads(answer.body)
        return answer.status_code, body["status"], body["models"]

    def reload(self) -> Any:
        return asyncio.run(self._endpoints["/admin/reload"]())


@pytest.fixture
def asked(tiny_bundle: Path) -> Iterator[Asked]:
    bundles = {"tiny": tiny_bundle, "other": tiny_bundle}
    models = Models(bundles, admission=Admission(Bounds()), load=LoadOptions(threads=1), warm_up_seconds=0.0)
    yield Asked(models)
    models.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def draw(models: Models) -> Any:
    ended, ends = threading.Event(), list[Event]()

    def listen(event: Event) -> None:
        if isinstance(event, Finished | Refused):
            ends.append(event)
            ended.set()

    with models.using() as model:
        model.submit(REQUEST, listen, id="1")
        assert ended.wait(60)
    return ends[0]


def test_a_server_is_ready_from_the_end_of_the_warm_up_until_it_ends(asked: Asked) -> None:
    later = {"state": "not_loaded", "reason": "it is opened when it is asked for"}
    assert asked.ready() == (503, "not_ready", {"tiny": later, "other": later})
    asked.models.open("tiny")
    assert asked.ready() == (200, "ready", {"tiny": {"state": "ready", "reason": ""}, "other": later})
    asked.traffic.ending = True
    assert asked.ready()[:2] == (503, "shutting_down")


def test_a_crashed_session_is_told_until_it_is_open_again_and_the_next_request_is_drawn(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(draw(asked.models), Finished)
    model, go_on, step = asked.models.opened("tiny"), threading.Event(), Batches.step
    assert model is not None
    reopen = model.scheduler._reopen
    monkeypatch.setattr(model.scheduler, "_reopen", lambda: (go_on.wait(60), reopen())[1])
    with monkeypatch.context() as planted:

        def crash(*_: Any) -> Any:
            raise RuntimeError("a message of a library, with /private/paths")

        planted.setattr(Batches, "step", crash)
        end = draw(asked.models)
    assert end.refusal.status == 500 and "private" not in f"{end.refusal}{end.refusal.hint}"
    status, word, models = asked.ready()
    assert (status, word) == (503, "not_ready")
    assert models["tiny"] == {
        "state": "unavailable",
        "reason": "a session has failed and is being opened again",
    }
    assert Batches.step is step
    threading.Timer(0.1, go_on.set).start()
    assert isinstance(draw(asked.models), Finished)  # accepted before, drawn after
    assert asked.ready()[0] == 200 and asked.models.opened("tiny") is model


def test_a_reload_says_what_it_did_and_runs_once_at_a_time(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked.models.open("tiny")
    assert asked.reload() == {"keys": "read", "models": {"tiny": "unchanged", "other": "not_loaded"}}
    go_on = threading.Event()
    monkeypatch.setattr(asked.models, "reload", lambda: (go_on.wait(60), {"tiny": "failed"})[1])

    async def twice() -> None:
        first = asyncio.create_task(asked._endpoints["/admin/reload"]())
        await asyncio.sleep(0.05)
        with pytest.raises(Refusal, match="a reload is running") as running:
            await asked._endpoints["/admin/reload"]()
        assert running.value.retry_after
        go_on.set()
        with pytest.raises(Refusal, match="the new version of tiny cannot be opened, and the old one stays"):
            await first

    asyncio.run(twice())
