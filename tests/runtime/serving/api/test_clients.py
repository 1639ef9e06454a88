"""Clients that go away, that share a drawing, or that read slowly: over real connections, with every step held back."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving_thread import server_thread

from ditc.runtime.decode import Decoded
from ditc.runtime.failure import Failure
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.serving.api import generations
from ditc.runtime.serving.api.drawing import MOST_WAITING, Events
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.scheduling.job import Cancelled, End, Finished, Job, Preview, Progress
from ditc.runtime.serving.scheduling.observer import Observer
from ditc.runtime.serving.scheduling.policy import BatchKey

PATIENCE = 120.0
ASKED = {"prompt": "red cat", "size": "64x64", "num_inference_steps": 6, "seed": 3}


@dataclass
class Gate(Observer):
    """Lets the scheduler do one step for each permit, and remembers what ended how."""

    steps: int = 0
    jobs: list[Job] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def accepted(self, job: Job) -> None:
        self.jobs.append(job)

    def stepped(self, key: BatchKey, size: int, seconds: float) -> None:
        self.steps += 1
        self.permits.acquire()

    def ended(self, job: Job, end: End) -> None:
        self.ends.append(end)

    def open(self) -> None:
        for _ in range(10_000):
            self.permits.release()


def wait_until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def models(gate: Gate, tiny_bundle: Path) -> Iterator[Models]:
    """One model, whose steps wait at the gate."""
    made = Models(
        {"tiny": tiny_bundle},
        admission=Admission(Bounds()),
        load=LoadOptions(threads=1),
        observe=lambda name: gate,
        warm_up_seconds=0,
    )
    yield made
    made.close()


@pytest.fixture
def port(gate: Gate, models: Models) -> Iterator[int]:
    """The application in a thread."""
    with server_thread(models=models) as server:
        yield server.port
        gate.open()


@contextmanager
def sent(port: int, key: str | None = None, **changes: Any) -> Iterator[http.client.HTTPConnection]:
    """A connection over which a request was sent, and which is closed after the block."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {"content-type": "application/json", **({"idempotency-key": key} if key else {})}
    connection.request("POST", "/v1/images/generations", json.dumps({**ASKED, **changes}), headers)
    try:
        yield connection
    finally:
        connection.close()


def answered(connection: http.client.HTTPConnection) -> dict[str, Any]:
    answer = connection.getresponse()
    body = json.load(answer)
    assert answer.status == 200, body
    return body  # type: ignore[no-any-return]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_cancelled_before_the_next_step(
    port: int, gate: Gate, stream: bool
) -> None:
    with sent(port, stream=stream) as connection:
        wait_until(lambda: gate.steps == 1)
        if stream:
            assert connection.getresponse().read(10)  # the answer has begun
    wait_until(lambda: gate.jobs[0].cancelled)
    gate.open()
    wait_until(lambda: gate.ends)
    assert isinstance(gate.ends[0], Cancelled)
    assert gate.steps == 1


def test_requests_with_one_idempotency_key_get_one_drawing_while_it_is_in_work(port: int, gate: Gate) -> None:
    changes = {"seed": None}
    with (
        sent(port, "a", **changes) as one,
        sent(port, "a", **changes) as two,
        sent(port, "b", **changes) as other,
    ):
        wait_until(lambda: gate.steps == 1 and len(gate.jobs) == 2)
        gate.open()
        first, second, third = (answered(connection) for connection in (one, two, other))
    assert first == second
    assert first["ditc"]["seed"] != third["ditc"]["seed"]
    assert len(gate.jobs) == 2


def test_a_shared_drawing_goes_on_until_its_last_client_has_gone(port: int, gate: Gate) -> None:
    with sent(port, "a"):
        wait_until(lambda: gate.steps == 1)
        with (
            sent(port, "a"),
            sent(port, "b"),
        ):  # when the second key is accepted, the first key has two clients
            wait_until(lambda: len(gate.jobs) == 2)
        wait_until(lambda: gate.jobs[1].cancelled)
        assert not gate.jobs[0].cancelled
    wait_until(lambda: gate.jobs[0].cancelled)
    with sent(port, "a") as again:  # the cancelled drawing is not its answer
        gate.open()
        assert answered(again)["data"]
    assert len(gate.jobs) == 3


def test_a_stream_that_shares_a_drawing_gets_its_pictures(port: int, gate: Gate) -> None:
    with sent(port, "a", stream=True) as one, sent(port, "a", stream=True) as two:
        wait_until(lambda: gate.steps == 1)
        gate.open()
        texts = [connection.getresponse().read().decode() for connection in (one, two)]
    completed = [
        [line for line in text.splitlines() if '"image_generation.completed"' in line] for text in texts
    ]
    assert completed[0] == completed[1]
    assert len(completed[0]) == 1
    assert len(gate.jobs) == 1


@pytest.mark.parametrize("key", [None, "a"])
def test_comments_keep_a_stream_open_while_nothing_happens(
    port: int, gate: Gate, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.setattr(generations, "KEEP_ALIVE_SECONDS", 0.01)
    with sent(port, key, stream=True) as one, sent(port, key, stream=True) as two:
        answer = two.getresponse()
        wait_until(lambda: gate.steps == 1)
        while answer.readline() != b": keep-alive\n":
            pass
        gate.open()
        assert b"image_generation.completed" in answer.read()
        one.getresponse().read()


def test_a_failed_picture_is_named_and_the_others_are_answered(port: int, gate: Gate, models: Models) -> None:
    gate.open()
    with models.using() as model:
        decode = model.pipeline.decode_state

    def spoiled(state: Any, plan: Any, first: int = 0) -> Decoded:
        decoded = decode(state, plan, first)
        if first == 0:
            return decoded
        return Decoded(pictures=[None], failures=(Failure(index=first, reason="planted"),))

    model.pipeline.decode_state = spoiled  # type: ignore[method-assign]
    with sent(port, n=2) as plain, sent(port, n=2, strict=True) as strict:
        body, refused = answered(plain), strict.getresponse()
        assert refused.status == 500
        assert json.load(refused)["error"]["code"] == "bad_picture"
    assert [picture["index"] for picture in body["data"]] == [0]
    assert body["ditc"]["failures"] == [{"index": 1, "reason": "planted"}]
    with sent(port, n=2, stream=True) as stream:
        assert stream.getresponse().read().count(b"event: image_generation.completed") == 1
    with sent(port, n=2, strict=True, stream=True) as stream:
        text = stream.getresponse().read().decode()
    event, data = text.strip().splitlines()[-2:]
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "bad_picture"


def test_a_slow_reader_loses_progress_and_previews_but_never_the_end() -> None:
    async def read() -> list[Any]:
        events = Events()
        for step in range(1000):
            events(Progress(step=step, total=1000))
            events(Preview(index=0, number=step, step=step, image=Image.new("RGB", (1, 1))))
        events(Progress(step=1000, total=1000))
        events(Progress(step=1001, total=1000))
        events(Finished(images=(), failures=(), seconds={}))
        await asyncio.sleep(0)
        found = []
        while not isinstance(event := await events.next(), Finished):
            found.append(event)
        return [*found, event]

    found = asyncio.run(read())
    assert len(found) == MOST_WAITING + 1
    assert found[-2] == Progress(step=1001, total=1000)  # and not the one before it


def test_without_events_there_is_nothing_after_the_time() -> None:
    async def read() -> Any:
        return await Events().next(0.01)

    assert asyncio.run(read()) is None
