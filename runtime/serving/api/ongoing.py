"""An accepted drawing until its pictures are encoded, and the requests that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ditc.runtime.serving.api.drawing import Drawing
from ditc.runtime.serving.api.encoding import Encoder
from ditc.runtime.serving.api.results import Result, details_of, encoded


class Ongoing:
    """An accepted drawing and, when it is there, its result.

    Attributes:
        drawing: None when there is a result or a refusal, so that nothing of it stays in memory but the result.
        asked: what the client asks for.
    """

    def __init__(self, drawing: Drawing, encoder: Encoder) -> None:
        self.drawing: Drawing | None = drawing
        self.asked = drawing.asked
        self.details = details_of(drawing)
        self._result = asyncio.create_task(self._encoded(drawing, encoder))
        self._result.add_done_callback(_retrieved)

    async def result(self) -> Result:
        """Wait for it. A caller that is cancelled does not cancel it for others. Raises Refusal if there is none."""
        return await asyncio.shield(self._result)

    def when_done(self, action: Callable[[asyncio.Task[Result]], None]) -> None:
        """Call this when there is a result or a refusal."""
        self._result.add_done_callback(action)

    def cancel(self) -> bool:
        """End it before its next step. False if it has ended, or its pictures are being encoded."""
        if self.drawing is None or self.drawing.events.end is not None:
            return False
        self.drawing.cancel()
        return True

    async def _encoded(self, drawing: Drawing, encoder: Encoder) -> Result:
        try:
            finished = await drawing.finished()
            run = encoder.run if drawing.asked.video is None else encoder.run_video
            return await run(encoded, drawing, finished, self.details)
        finally:
            self.drawing = None
            drawing.release()


class Shared:
    """A drawing with the requests that wait for it. When the last one leaves, it is cancelled.

    Args:
        begin: begins it when the first request joins.
        abandoned: called when it is cancelled because nobody waits any more.
    """

    def __init__(
        self,
        begin: Callable[[], Coroutine[Any, Any, Ongoing]],
        *,
        abandoned: Callable[[], None] = lambda: None,
    ) -> None:
        self._begin: Callable[[], Coroutine[Any, Any, Ongoing]] | None = begin
        self._abandoned = abandoned
        self._beginning: asyncio.Task[Ongoing] | None = None
        self._waiting = 0

    async def join(self) -> tuple[Ongoing, bool]:
        """Wait until it is accepted. Each caller that gets it calls `leave` once.

        Returns:
            The drawing, and whether the caller is the first one, who alone may read its progress and previews.

        Raises:
            Refusal: it is not accepted.
        """
        # It holds the request with its pictures, and this may be kept long.
        begin, self._begin = self._begin, None
        if begin is not None:
            self._beginning = asyncio.create_task(begin())
            self._beginning.add_done_callback(_retrieved)
        assert self._beginning is not None
        self._waiting += 1
        try:
            return await asyncio.shield(self._beginning), begin is not None
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Wait no more."""
        self._waiting -= 1
        beginning = self._beginning
        if self._waiting or beginning is None:
            return
        if not beginning.done():
            beginning.cancel()
            self._abandoned()
        elif not beginning.cancelled() and beginning.exception() is None and beginning.result().cancel():
            self._abandoned()


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Errors reach those who wait. If nobody does, asyncio must not log that they were never looked at."""
    if not task.cancelled():
        task.exception()
