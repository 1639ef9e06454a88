"""Requests on their way to replicas: those whose replica is lost, or whose client leaves, in the same moment."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ditc.runtime.serving.replicas import replica
from ditc.runtime.serving.replicas.dispatcher import Dispatcher
from ditc.runtime.serving.replicas.messages import Message, Version
from ditc.runtime.serving.replicas.replica import Replica
from ditc.runtime.serving.replicas.seat import Seat, Task
from ditc.runtime.serving.scheduling.job import Cancelled, End, Job

VERSION = Version("tiny", "0" * 64)


class Handle:
    """A replica that draws for ever."""

    name = "replica"

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.cancelling: weakref.ref[asyncio.Future[None]] | None = None

    async def draw(self, asked: Message) -> AsyncIterator[Message]:
        self.begun.append(asked["id"])
        await asyncio.Event().wait()
        yield {}

    async def cancel(self, id: str) -> None:
        answer = asyncio.get_running_loop().create_future()
        self.cancelling = weakref.ref(answer)
        await answer


class Scheduler:
    """Keeps the ends of jobs."""

    version, pictures_ahead = VERSION, 2

    def __init__(self) -> None:
        self.ends: list[End] = []

    def finish(self, job: Job, end: End) -> None:
        self.ends.append(end)
        job.finish(end)

    def seeded(self, plan: Any) -> Any:
        return plan.request


class Dispatched:
    """A dispatcher with one request in a replica."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ditc.runtime.serving.replicas.dispatcher.message_of_request", lambda request: {})
        self.handle, self.scheduler = Handle(), Scheduler()
        self.seats = [self.seat()]
        self.dispatcher = Dispatcher(self.seats, lost=lambda seat, why: None, clock=lambda: 0.0)
        plan: Any = SimpleNamespace(pictures=1, runs=1, request=None)
        job = Job(id="one", plan=plan, listener=lambda event: None, arrived=0.0, due=1.0)
        self.task = Task(job=job, scheduler=self.scheduler, work=1)  # type: ignore[arg-type]
        self.dispatcher.add(self.task)

    def seat(self) -> Seat:
        return Seat(handle=self.handle, versions={VERSION}, ready=True)  # type: ignore[arg-type]

    def lose_replica(self) -> None:
        """What the pool does."""
        (seat,) = self.seats
        seat.gone, seat.ready = True, False
        self.seats.remove(seat)
        assert self.task.drawing is not None
        self.task.drawing.cancel()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_whose_replica_is_lost_goes_to_another_one_even_before_it_has_begun(
    monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    async def test() -> None:
        made = Dispatched(monkeypatch)
        if begun:
            await asyncio.sleep(0.01)
        made.lose_replica()
        await asyncio.sleep(0.01)
        assert made.dispatcher.waiting == [made.task] and made.task.drawing is None
        made.seats.append(made.seat())
        made.dispatcher.dispatch()
        await asyncio.sleep(0.01)
        assert made.handle.begun == (["one-1", "one-2"] if begun else ["one-1"])

    run(test)


def test_a_request_that_is_cancelled_when_its_replica_is_lost_goes_to_no_other_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        made = Dispatched(monkeypatch)
        await asyncio.sleep(0.01)
        made.lose_replica()
        made.task.job.cancelled = True  # as the scheduler does before it tells the dispatcher
        made.dispatcher.cancel(made.task.job)
        made.seats.append(made.seat())
        await asyncio.sleep(0.01)
        assert [type(end) for end in made.scheduler.ends] == [Cancelled]
        assert made.handle.begun == ["one-1"] and not made.dispatcher.waiting

    run(test)


def test_what_cancels_a_request_in_its_replica_is_not_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        made = Dispatched(monkeypatch)
        await asyncio.sleep(0.01)
        made.dispatcher.cancel(made.task.job)
        await asyncio.sleep(0.01)
        gc.collect()
        assert made.handle.cancelling is not None and made.handle.cancelling() is not None

    run(test)


@pytest.mark.parametrize("by", ["its client", "another front"])
def test_a_request_that_is_cancelled_while_a_replica_checks_it_is_not_drawn(
    monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(replica, "request_of_message", lambda message: message)
    checking, checked = threading.Event(), threading.Event()
    cancelled: list[object] = []

    def submit(*args: object, **kwargs: object) -> str:
        checking.set()
        assert checked.wait(60)
        return "the job"

    async def test() -> None:
        made = Replica(0)
        scheduler = SimpleNamespace(cancel=cancelled.append)
        made._models[VERSION] = SimpleNamespace(submit=submit, scheduler=scheduler)  # type: ignore[assignment]
        asked = {"id": "one-1", "version": VERSION, "request": {}, "timeout": None, "previews": 0}
        drawing = asyncio.ensure_future(anext(made.draw(asked)))
        await asyncio.to_thread(checking.wait, 60)
        await (made.cancel("one-1") if by == "its client" else made.begin())
        checked.set()
        await asyncio.sleep(0.1)
        assert cancelled == ["the job"]
        drawing.cancel()

    run(test)
