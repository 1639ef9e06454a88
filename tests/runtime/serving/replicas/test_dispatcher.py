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
from PIL import Image

from ditc.runtime.serving.refusals import Unavailable
from ditc.runtime.serving.replicas import messages, replica
from ditc.runtime.serving.replicas.dispatcher import Dispatcher
from ditc.runtime.serving.replicas.messages import Message, Version
from ditc.runtime.serving.replicas.replica import PARTS_AHEAD, Replica
from ditc.runtime.serving.replicas.seat import Seat, Task
from ditc.runtime.serving.scheduling.job import Cancelled, End, Event, Finished, Job, Refused

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


def test_a_request_that_is_cancelled_before_its_replica_is_asked_never_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        made = Dispatched(monkeypatch)
        made.dispatcher.cancel(made.task.job)
        await asyncio.sleep(0.01)
        assert made.handle.begun == [] and made.task.job.began is None
        assert [type(end) for end in made.scheduler.ends] == [Cancelled]
        assert not made.seats[0].tasks and not made.dispatcher.waiting

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


def test_a_request_whose_model_is_closed_while_it_waits_goes_to_no_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        made = Dispatched(monkeypatch)
        await asyncio.sleep(0.01)
        made.lose_replica()
        await asyncio.sleep(0.01)
        made.scheduler.finish(made.task.job, Refused(Unavailable("the model was closed")))
        made.seats.append(made.seat())
        made.dispatcher.dispatch()
        await asyncio.sleep(0.01)
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


class Model:
    """Its jobs are given to it, and end as soon as they are submitted."""

    def __init__(self, *ends: End, submit: Callable[[], None] = lambda: None) -> None:
        self.scheduler = SimpleNamespace(cancel=self.cancel, problem="", times=SimpleNamespace(snapshot=dict))
        self.cancelled: list[object] = []
        self._ends, self._before = ends, submit

    def cancel(self, job: Any) -> None:
        self.cancelled.append(job)
        job.cancelled = True

    def submit(self, request: object, listener: Callable[[Event], None], **options: object) -> Any:
        self._before()
        for end in self._ends:
            listener(end)
        return SimpleNamespace(cancelled=False)


def asked_of(model: Model, monkeypatch: pytest.MonkeyPatch) -> tuple[Replica, Message]:
    monkeypatch.setattr(replica, "request_of_message", lambda message: message)
    made = Replica(0)
    made._models[VERSION] = model  # type: ignore[assignment]
    return made, {"id": "one-1", "version": VERSION, "request": {}, "timeout": None, "previews": 0}


def film(frames: int) -> Finished:
    """A video whose frames are 3 bytes each."""
    video = tuple(Image.new("RGB", (1, 1), (number, 0, 0)) for number in range(frames))
    return Finished(images=(), failures=(), seconds={}, videos=(video,))


def test_a_replica_sends_no_more_parts_of_a_video_than_the_front_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(messages, "PART_BYTES", 3)
    heard: list[Message] = []

    async def test() -> None:
        made, asked = asked_of(Model(film(20)), monkeypatch)

        async def follow() -> None:
            async for message in made.draw(asked):
                heard.append(message)

        following = asyncio.ensure_future(follow())
        for taken in range(19 - PARTS_AHEAD):
            while len(heard) < PARTS_AHEAD + taken:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.005)
            assert len(heard) == PARTS_AHEAD + taken and not following.done()
            assert not (await made.health())["stuck"]  # it waits for the front, and does not hang
            await made.taken("one-1")
        await following
        assert [one["kind"] for one in heard] == ["pixels"] * 19 + ["finished"]
        assert not made._sending

    run(test)


@pytest.mark.parametrize("by", ["its client", "another front", "its own end"])
def test_a_video_that_nobody_waits_for_is_not_kept(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setattr(messages, "PART_BYTES", 3)

    async def test() -> None:
        made, asked = asked_of(Model(film(20)), monkeypatch)
        drawing = made.draw(asked)
        for _ in range(PARTS_AHEAD):
            assert (await anext(drawing))["kind"] == "pixels"
        waiting = asyncio.ensure_future(anext(drawing))
        await asyncio.sleep(0.02)
        assert not waiting.done() and list(made._sending) == ["one-1"]
        if by == "its own end":
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        else:
            await (made.cancel("one-1") if by == "its client" else made.begin())
            assert await waiting == {"kind": "cancelled"}
            assert [message async for message in drawing] == []
        assert not made._sending and not made._jobs

    run(test)


def test_a_request_whose_stream_is_cancelled_while_a_replica_checks_it_is_not_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checking, checked = threading.Event(), threading.Event()

    def submit() -> None:
        checking.set()
        assert checked.wait(60)

    async def test() -> None:
        model = Model(submit=submit)
        made, asked = asked_of(model, monkeypatch)
        drawing = asyncio.ensure_future(anext(made.draw(asked)))
        await asyncio.to_thread(checking.wait, 60)
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        checked.set()
        while not model.cancelled:
            await asyncio.sleep(0.01)
        assert len(model.cancelled) == 1

    run(test)


def test_a_front_that_cannot_take_an_answer_ends_it_in_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the replica would keep its pictures, and wait for the front."""

    async def test() -> None:
        made = Dispatched(monkeypatch)

        async def broken(asked: Message) -> AsyncIterator[Message]:
            yield {"kind": "finished"}

        ended: list[str] = []

        async def cancel(id: str) -> None:
            ended.append(id)

        made.handle.draw, made.handle.cancel = broken, cancel  # type: ignore[method-assign]
        await asyncio.sleep(0.05)
        assert [type(end) for end in made.scheduler.ends] == [Refused] and ended == ["one-1"]

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
