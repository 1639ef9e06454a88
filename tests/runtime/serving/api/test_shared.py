"""Requests that share a drawing, from one moment of the event loop to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import Response

from ditc.runtime.request import Request
from ditc.runtime.serving.api import api, generations, hugging_face
from ditc.runtime.serving.api.asked import Asked
from ditc.runtime.serving.api.drawing import Drawing, Events
from ditc.runtime.serving.api.idempotency import Idempotency
from ditc.runtime.serving.api.kept import Kept
from ditc.runtime.serving.api.ongoing import Shared
from ditc.runtime.serving.http.callers import Caller
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Unavailable
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.scheduling.job import Cancelled

ASKED = Asked(request=Request(prompt="red cat"))


class Ongoing:
    """A drawing that waits, until it is cancelled or done."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.cancelled = False
        self.details = SimpleNamespace(model_dump_json=lambda ensure_ascii: "{}")
        self.pictures = (b"a picture",)

    async def result(self) -> Any:
        await self.done.wait()
        return self

    def cancel(self) -> bool:
        self.cancelled = True
        return True

    def when_done(self, action: object) -> None:
        """Nothing is done."""


class Api:
    """Begins such drawings, all with one idempotency key."""

    limits = None

    def __init__(self) -> None:
        self.begun: list[Ongoing] = []
        self.idempotency = Idempotency(Kept(most=8, most_bytes=100, seconds=60))
        self.encoder = SimpleNamespace(run=self._encode)

    def shared(self, http: object, asked: object, body: object, files: str = "") -> Shared:
        return self.idempotency.shared("", "key", "asked", self._begin)  # type: ignore[arg-type]

    async def _begin(self) -> Ongoing:
        self.begun.append(Ongoing())
        return self.begun[-1]

    async def _encode(self, *args: object) -> bytes:
        return b"{}"


async def no_message() -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize("path", ["generations", "Hugging Face"])
def test_who_asks_when_the_last_client_leaves_gets_a_drawing_of_its_own(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    made: Any = Api()
    http: Any = SimpleNamespace(receive=no_message, headers={}, stream=False)
    for module in (generations, hugging_face):
        monkeypatch.setattr(module, "api_of", lambda http: made)
    monkeypatch.setattr(generations, "images_answer", lambda result: b"{}")
    monkeypatch.setattr(hugging_face, "asked_by_hugging_face", lambda *args, **kwargs: ASKED)

    def ask() -> Awaitable[Response]:
        if path == "generations":
            return generations.drawn(http, ASKED, http)
        return hugging_face.text_to_image(http, "tiny", http)

    async def test() -> None:
        first = made.shared(http, ASKED, http)
        ongoing, _ = await first.join()
        second = asyncio.ensure_future(ask())
        asyncio.get_running_loop().call_soon(
            first.leave
        )  # after the second request has come, before it waits
        await asyncio.sleep(0.05)
        assert ongoing.cancelled and len(made.begun) == 2 and not made.begun[1].cancelled
        made.begun[1].done.set()
        assert (await asyncio.wait_for(second, 10)).status_code == 200

    run(test)


def test_an_accepted_drawing_that_cannot_be_described_is_ended_and_gives_back_its_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when a crash has lost the LoRA of its model in this moment."""

    def lost(*_: object) -> None:
        raise Unavailable("the model cannot be drawn now")

    async def test() -> None:
        cancelled, released = list[object](), list[int]()
        model: Any = SimpleNamespace(scheduler=SimpleNamespace(cancel=cancelled.append))
        job: Any = SimpleNamespace(id="one")
        drawing = Drawing(model, job, Events(), ASKED, lambda: released.append(1))

        async def begun(*_: object) -> Drawing:
            return drawing

        found = api.Api(Models({"tiny": Path("nowhere")}, admission=Admission(Bounds())))
        monkeypatch.setattr(found._beginnings, "begin", begun)
        monkeypatch.setattr(api, "Ongoing", lost)
        with pytest.raises(Unavailable):
            await found.begin(ASKED, Caller("local"), "id")
        assert cancelled == [job] and not released
        drawing.events(Cancelled())
        await asyncio.sleep(0.01)
        assert released
        found.close()

    run(test)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]
