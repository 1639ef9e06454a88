"""Hands requests to replicas: the one that is due first goes to the replica with the least work that can take it.

A request whose replica is lost goes to another one, once. That draws the same picture, because the front has chosen the
seed. A request that ends two replicas is given up, lest it ends them all.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from ditc.runtime.serving.log_text import where_raised
from ditc.runtime.serving.refusals import Broken
from ditc.runtime.serving.replicas.handle import ReplicaLost
from ditc.runtime.serving.replicas.messages import Message, event_of_message, message_of_request
from ditc.runtime.serving.replicas.seat import Seat, Task
from ditc.runtime.serving.scheduling.job import Cancelled, Finished, Job, Preview, Progress, Refused

log = logging.getLogger(__name__)

# How many replicas may begin a request.
MOST_TRIES = 2


class Dispatcher:
    """Only the pool's event loop uses it.

    Args:
        seats: all replicas; the pool changes the list.
        lost: told of a replica that is lost, and why.
    """

    def __init__(
        self, seats: Sequence[Seat], *, lost: Callable[[Seat, str], None], clock: Callable[[], float]
    ) -> None:
        self.waiting: list[Task] = []
        self._stopping: set[asyncio.Task[None]] = set()  # so that they are not collected
        self._seats, self._lost, self._clock = seats, lost, clock

    @property
    def pixel_steps(self) -> int:
        """All accepted work."""
        drawn = sum(task.work for seat in self._seats for task in seat.tasks)
        return drawn + sum(task.work for task in self.waiting)

    def add(self, task: Task) -> None:
        """Take a request that was accepted."""
        self.waiting.append(task)
        self.dispatch()

    def cancel(self, job: Job) -> None:
        """End a request at once, and let its replica stop before its next step."""
        for task in self._all():
            if task.job is job:
                task.scheduler.finish(job, Cancelled())
                self._stop(task)

    def dispatch(self) -> None:
        """Hand out as much as replicas have room for, in the order of the due times."""
        # Those that have ended because their model was closed would be drawn for nobody.
        self.waiting[:] = [task for task in self.waiting if task.job.end is None]
        for task in sorted(self.waiting, key=lambda task: task.job.due):
            free = [seat for seat in self._seats if seat.has_room(task)]
            if free:
                seat = min(free, key=lambda seat: seat.left)
                self.waiting.remove(task)
                seat.tasks.add(task)
                drawing = asyncio.get_running_loop().create_task(self._draw(seat, task))
                drawing.add_done_callback(partial(self._if_not_begun, seat, task))
                task.drawing = drawing

    def end_hopeless(self) -> None:
        """End the requests that wait here and cannot be done in time."""
        for task in list(self.waiting):
            if (end := task.scheduler.too_late(task.job)) is not None:
                self.waiting.remove(task)
                task.scheduler.finish(task.job, end)

    def _all(self) -> list[Task]:
        return [*self.waiting, *(task for seat in self._seats for task in seat.tasks)]

    def _stop(self, task: Task) -> None:
        if task in self.waiting:
            self.waiting.remove(task)
            return
        for seat in self._seats:
            if task in seat.tasks:
                stopping = asyncio.get_running_loop().create_task(_cancel(seat, task))
                self._stopping.add(stopping)
                stopping.add_done_callback(self._stopping.discard)

    def _if_not_begun(self, seat: Seat, task: Task, drawing: asyncio.Task[None]) -> None:
        """Let another replica draw a request whose replica was lost before `_draw` ran at all."""
        if drawing.cancelled():
            task.drawing = None
            seat.tasks.discard(task)
            self._again(task)
            self.dispatch()

    async def _draw(self, seat: Seat, task: Task) -> None:
        job = task.job
        try:
            # It may have been cancelled between being handed out and now.
            if job.end is not None or await self._listen(seat, task):
                return
            raise ReplicaLost("it has sent no end")
        except (ReplicaLost, asyncio.CancelledError) as e:  # cancelled by the pool, when the replica is lost
            if not seat.gone:
                self._lost(seat, str(e))
            self._again(task)
        except Exception as e:
            log.error("request %s failed:\n%s", job.id, where_raised(e))
            self._stop(task)  # lest it is drawn, or its pictures are kept there, for nobody
            task.scheduler.finish(job, Refused(Broken("the server has failed")))
        finally:
            task.drawing = None
            seat.tasks.discard(task)
            self.dispatch()

    async def _listen(self, seat: Seat, task: Task) -> bool:
        """Follow a request in its replica. False if the stream ends without an end of the request."""
        job, now = task.job, self._clock()
        task.tries += 1
        if job.began is None:
            job.began = now
        asked: Message = {
            "id": f"{job.id}-{task.tries}",
            "version": task.version,
            "request": message_of_request(task.scheduler.seeded(job.plan)),
            "timeout": None if job.deadline is None else max(0.001, job.deadline - now),
            "previews": job.previews,
        }
        pixels = deque[bytes]()
        async for message in seat.handle.draw(asked):
            if message["kind"] == "pixels":
                pixels.append(message["pixels"])
                await seat.handle.taken(asked["id"])
                continue
            if message["kind"] == "not_open":
                seat.versions.discard(task.version)
                task.tries -= 1
                self._again(task)
                return True
            if pixels:  # which may take long, and the others shall not wait
                event = await asyncio.to_thread(event_of_message, message, pixels)
            else:
                event = event_of_message(message)
            if isinstance(event, Progress):
                if (event.step, event.frame) > (
                    job.steps_done,
                    job.frames_done,
                ):  # a second replica begins anew
                    job.steps_done, job.decoded = event.step, {0: event.frame}
                    job.report(event)
            elif isinstance(event, Preview):
                if (event.index, event.number) not in task.shown:
                    task.shown.add((event.index, event.number))
                    job.report(event)
            else:
                if isinstance(event, Finished):
                    event = task.scheduler.timed(job, event)
                task.scheduler.finish(job, event)
                return True
        return False

    def _again(self, task: Task) -> None:
        """Let another replica draw a request whose replica is lost, unless it was the second one, or nobody waits."""
        job = task.job
        if job.end is not None:
            return
        if job.cancelled:
            task.scheduler.finish(job, Cancelled())
            return
        if task.tries < MOST_TRIES:
            log.warning("request %s waits for another replica", job.id)
            self.waiting.append(task)
            return
        refusal = Broken("the replicas that drew this request have ended", retry_after=1.0)
        task.scheduler.finish(job, Refused(refusal))


async def _cancel(seat: Seat, task: Task) -> None:
    try:
        await seat.handle.cancel(f"{task.job.id}-{task.tries}")
    except ReplicaLost:  # then it draws no more
        return
