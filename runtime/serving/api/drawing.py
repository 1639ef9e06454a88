"""A job as a coroutine sees it: begun on a thread, listened to on the event loop, cancelled when nobody waits."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from time import monotonic

from ditc.runtime.errors import UsageError
from ditc.runtime.image_input import GivenImages
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.api.asked import Asked
from ditc.runtime.serving.api.byte_room import ByteRoom, video_need
from ditc.runtime.serving.api.kinds import check_model, check_model_before_opening, with_frames
from ditc.runtime.serving.api.request_limits import RequestLimits
from ditc.runtime.serving.http.callers import Caller
from ditc.runtime.serving.model import Model
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Invalid, Refusal, TooLate
from ditc.runtime.serving.scheduling.admission import work_of
from ditc.runtime.serving.scheduling.job import (
    Cancelled,
    End,
    Event,
    Finished,
    Job,
    Preview,
    Progress,
    Refused,
)
from ditc.runtime.sizes import size_like
from ditc.runtime.step_contract import GuidanceMode

# Events that wait for a slow reader. A preview has one pixel per latent cell, so it is small.
MOST_WAITING = 32
# Checking a request takes a few milliseconds, of which most hold the interpreter's lock.
THREADS = 4
# WebP has 14 bits for each side.
WEBP_SIDE = 2**14 - 1


class Events:
    """Brings a job's events from the scheduler's threads to a coroutine.

    A reader that is too slow gets only the newest progress, and loses the oldest previews, but never the end.
    """

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Progress | Preview] = deque(maxlen=most)
        self._woken = asyncio.Event()
        self._when_ended: list[Callable[[], None]] = []
        self.end: End | None = None
        self.ended = asyncio.Event()

    def __call__(self, event: Event) -> None:
        """The job's listener. Called on threads of the scheduler."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._put, event)

    def when_ended(self, action: Callable[[], None]) -> None:
        """Call this on the event loop at the end, or at once if that has been."""
        if self.end is None:
            self._when_ended.append(action)
        else:
            action()

    async def next(self, seconds: float | None = None) -> Event | None:
        """The next event, or None if there is none for so many seconds. After the end it is always the end."""
        while not self._waiting and self.end is None:
            self._woken.clear()
            try:
                await asyncio.wait_for(self._woken.wait(), seconds)
            except TimeoutError:
                return None
        return self._waiting.popleft() if self._waiting else self.end

    async def has_ended(self, seconds: float) -> bool:
        """Wait for the end, at most so many seconds. It takes no events."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), seconds)
        return self.end is not None

    def _put(self, event: Event) -> None:
        if isinstance(event, Progress | Preview):
            if isinstance(event, Progress) and self._waiting and isinstance(self._waiting[-1], Progress):
                self._waiting.pop()
            self._waiting.append(event)
        else:
            self.end = event
            self.ended.set()
            for action in self._when_ended:
                action()
        self._woken.set()


class Drawing:
    """An accepted request. Its model stays open until its end.

    Args:
        release: to be called when its frames are not needed any more. It may be called again.
    """

    def __init__(
        self, model: Model, job: Job, events: Events, asked: Asked, release: Callable[[], None]
    ) -> None:
        self.model, self.job, self.events, self.asked, self.release = model, job, events, asked, release

    def cancel(self) -> None:
        """End it before its next step. Nothing happens if it has ended."""
        self.model.scheduler.cancel(self.job)

    def abandon(self) -> None:
        """Cancel it, and give back the room of its frames at its end: nobody waits for it."""
        self.events.when_ended(self.release)
        self.cancel()

    async def finished(self) -> Finished:
        """Wait for the pictures. It takes no events, which another coroutine may read.

        Raises:
            Refusal: there are none.
        """
        await self.events.ended.wait()
        assert self.events.end is not None
        return pictures_of(self.events.end)


def pictures_of(end: End) -> Finished:
    """The end, if it brought pictures. Raises the refusal if not."""
    if isinstance(end, Refused):
        raise end.refusal
    if isinstance(end, Cancelled):
        raise Refusal("the request was cancelled", status=499, code="cancelled")
    return end


class Beginnings:
    """Checks requests and hands them to their schedulers, on threads, for a schedule may take milliseconds."""

    def __init__(self, models: Models, limits: RequestLimits) -> None:
        self._models, self._limits = models, limits
        self._frames = ByteRoom(limits.max_frame_bytes, "frames")
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ditc-begin")

    async def begin(self, asked: Asked, caller: Caller) -> Drawing:
        """Accept a request, when its model is open.

        Raises:
            Refusal: the request cannot be drawn, or the queue is full.
        """
        loop, events, arrived = asyncio.get_running_loop(), Events(), monotonic()
        if self._models.opened(asked.model or self._models.names[0]) is None:
            await loop.run_in_executor(self._pool, check_model_before_opening, self._models, asked)
        async with self._models.using_async(asked.model, timeout=asked.timeout):
            beginning = loop.run_in_executor(self._pool, self._begin, asked, caller, events, arrived)
            try:
                drawing, opened = await asyncio.shield(beginning)
            except asyncio.CancelledError:
                beginning.add_done_callback(_abandon)
                raise
        events.when_ended(opened.close)
        return drawing

    def close(self) -> None:
        """Wait for what is in work."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(
        self, asked: Asked, caller: Caller, events: Events, arrived: float
    ) -> tuple[Drawing, ExitStack]:
        """Returns also what is closed at the end of the drawing."""
        with ExitStack() as stack:
            model = stack.enter_context(self._models.using(asked.model))
            try:
                plan = self._plan(model, asked)
                timeout = _left(asked.timeout, arrived)
                stack.enter_context(caller.drawing(work_of(plan)))
                with ExitStack() as room:
                    release = self._frames.take(video_need(plan, model.pipeline.manifest, model.name))
                    room.callback(release)
                    job = model.scheduler.submit(
                        plan, events, id=secrets.token_hex(12), timeout=timeout, previews=asked.previews
                    )
                    room.pop_all()
            except UsageError as e:
                raise asked.invalid(e) from e
            return Drawing(model, job, events, asked.without_pictures(), release), stack.pop_all()

    def _plan(self, model: Model, asked: Asked) -> Plan:
        check_model(model.pipeline.manifest, model.name, asked)
        if asked.previews and not model.pipeline.manifest.latents.rgb:
            raise Invalid(
                "partial_images are not possible: this model has no matrix from latents to colours",
                hint="leave partial_images out",
                param="partial_images",
            )
        negative = asked.request.further_texts(negative=True) | {
            "negative_prompt": asked.request.negative_prompt
        }
        used = model.pipeline.manifest.guidance is GuidanceMode.CFG
        if not used and (given := sorted(name for name, text in negative.items() if text)):
            raise Invalid(
                f"{given[0]} would have no effect: this model's guidance is part of its network",
                hint=f"leave {given[0]} out",
                param=given[0],
                code="unsupported_value",
            )
        request = asked.request
        image = request.control_image if request.image is None else request.image
        if isinstance(image, GivenImages) and request.height is request.width is None:
            height, width = size_like(*image.size(), model.pipeline.manifest.defaults)
            request = replace(request, height=height, width=width)
        if asked.video is not None:
            request = with_frames(request, asked.video, model)
        plan = model.plan(request)
        self._limits.check_plan(plan)
        form = asked.format if asked.video is None else asked.video.format
        if form == "webp" and max(plan.width, plan.height) > WEBP_SIDE:
            raise Invalid(
                f"a WebP picture has at most {WEBP_SIDE} pixels on a side",
                hint="choose another output_format",
                param="output_format",
            )
        return plan


def _left(timeout: float | None, arrived: float) -> float | None:
    """The seconds that are left of a timeout. Raises TooLate if it has passed."""
    left = None if timeout is None else timeout - (monotonic() - arrived)
    if left is not None and left <= 0:
        raise TooLate("the timeout passed before the model could draw", hint="allow more time")
    return left


def _abandon(beginning: asyncio.Future[tuple[Drawing, ExitStack]]) -> None:
    """Cancel what was begun for a client that has gone away in the meantime."""
    if not beginning.cancelled() and beginning.exception() is None:
        drawing, opened = beginning.result()
        drawing.events.when_ended(opened.close)
        drawing.abandon()
