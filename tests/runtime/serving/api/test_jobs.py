"""Jobs and the encoding of their results, without a model."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ditc.runtime.request import Request
from ditc.runtime.serving.api import ongoing
from ditc.runtime.serving.api.asked import Asked, VideoForm
from ditc.runtime.serving.api.encoding import Encoder
from ditc.runtime.serving.api.image_jobs import ImageJob
from ditc.runtime.serving.api.jobs import Jobs
from ditc.runtime.serving.api.kept import Kept
from ditc.runtime.serving.api.ongoing import Ongoing
from ditc.runtime.serving.refusals import Broken


class Drawing:
    """A drawing that is done at once.

    Args:
        error: what it ends with.
    """

    model = None

    def __init__(self, asked: Asked, error: Exception | None = None) -> None:
        self.asked, self._error = asked, error
        self.job = SimpleNamespace(plan=SimpleNamespace(pictures=1))
        self.events = SimpleNamespace(when_ended=lambda action: None, end=None)

    async def finished(self) -> None:
        await asyncio.sleep(0)
        if self._error is not None:
            raise self._error

    def release(self) -> None:
        """Its frames are not needed any more."""


@pytest.fixture(autouse=True)
def details(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ongoing, "details_of", lambda drawing: SimpleNamespace(id="one"))


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


def begun(drawing: Any, encoder: Encoder) -> Ongoing:
    return Ongoing(drawing, encoder)


def job_with(error: Exception, encoder: Encoder) -> tuple[ImageJob, weakref.ref[Drawing]]:
    drawing = Drawing(Asked(request=Request(prompt="red cat")), error)
    jobs = Jobs(ImageJob, Kept[Any](most=2, most_bytes=100, seconds=60))
    return jobs.add("", begun(drawing, encoder)), weakref.ref(drawing)


def test_what_no_client_may_read_of_a_failed_job_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        job, _ = job_with(RuntimeError("at the prompt: red cat"), Encoder())
        while job.ongoing is not None:
            await asyncio.sleep(0.01)
        assert job.status == "failed" and str(job.outcome) == "the server has failed"

    run(test)
    (record,) = caplog.records
    assert "imgjob_one" in record.getMessage() and "RuntimeError" in record.getMessage()
    assert "red cat" not in record.getMessage()


def test_a_failed_job_says_what_to_do_as_every_answer_does() -> None:
    async def test() -> None:
        job, _ = job_with(Broken("a stage\nfailed" + 2000 * "!", hint="try again"), Encoder())
        assert job.error is None
        while job.ongoing is not None:
            await asyncio.sleep(0.01)
        assert job.error is not None and job.error.code == "generation_failed"
        assert job.error.message.startswith("a stage failed!!") and len(job.error.message) == 1000
        job.outcome = Broken("a stage failed", hint="try again")
        assert job.error.message == "a stage failed; try again"

    run(test)


def test_a_failed_job_keeps_nothing_of_its_drawing() -> None:
    async def test() -> None:
        refusal = Broken("a stage failed", hint="try again", retry_after=1.0)
        job, drawing = job_with(refusal, Encoder())
        del refusal
        while job.ongoing is not None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        kept = job.outcome
        assert isinstance(kept, Broken) and (str(kept), kept.hint) == ("a stage failed", "try again")
        assert (kept.status, kept.code, kept.retry_after) == (500, "generation_failed", 1.0)
        gc.collect()
        assert drawing() is None

    run(test)


def test_a_job_that_is_cancelled_while_its_pictures_are_encoded_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client was told so, and found it completed."""
    began, go_on = threading.Event(), threading.Event()

    def encoded(*args: Any) -> Any:
        began.set()
        go_on.wait(60)
        return SimpleNamespace(size_bytes=90)

    monkeypatch.setattr(ongoing, "encoded", encoded)

    async def test() -> None:
        jobs = Jobs(ImageJob, Kept[Any](most=2, most_bytes=100, seconds=60))
        drawing = Drawing(Asked(request=Request(prompt="red cat")))
        drawing.events.end = "finished"
        job = jobs.add("", begun(drawing, Encoder()))
        await asyncio.to_thread(began.wait, 60)
        jobs.cancel(job)
        go_on.set()
        while job.ongoing is not None:
            await asyncio.sleep(0.01)
        assert (job.status, job.result, job.error) == ("cancelled", None, None)
        assert jobs.find("", job.id) is job

    run(test)


def test_videos_that_are_encoded_hold_no_other_answer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(ongoing, "encoded", lambda *args: held.wait(60))

    async def test() -> None:
        encoder = Encoder()
        asked = Asked(request=Request(prompt="red cat"), video=VideoForm(format="webp"))
        videos = [begun(Drawing(asked), encoder) for _ in range(3)]
        await asyncio.sleep(0.1)
        try:
            assert await asyncio.wait_for(encoder.run(str, 1), 20) == "1"
        finally:
            held.set()
        for video in videos:
            assert await video.result()

    run(test)


def test_an_encoder_that_is_closed_waits_for_nothing() -> None:
    began, held, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        held.wait(60)

    async def test() -> None:
        encoder = Encoder(threads=1)
        first, second = (asyncio.ensure_future(encoder.run(one)) for one in (work, done.set))
        await asyncio.to_thread(began.wait, 60)
        assert not encoder.close()
        held.set()
        await first
        with pytest.raises(asyncio.CancelledError):
            await second
        while not encoder.close():
            await asyncio.sleep(0.01)
        assert not done.is_set()

    run(test)
