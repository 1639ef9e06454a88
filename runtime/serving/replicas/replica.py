"""A replica: bundles with a scheduler each, in a process of its own. It knows nothing of HTTP, of Ray, or of others.

The front decides which versions are open and which requests come here. Bounds of accepted work are the front's, too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from time import monotonic, sleep

from ditc.runtime.cores import allowed_cpus
from ditc.runtime.errors import BundleError, DitcError, SessionError, UsageError
from ditc.runtime.serving.model import Model, open_model
from ditc.runtime.serving.refusals import Invalid, Refusal
from ditc.runtime.serving.replicas.handle import Bundle
from ditc.runtime.serving.replicas.messages import (
    Message,
    Opened,
    Version,
    messages_of_event,
    plain_error,
    request_of_message,
)
from ditc.runtime.serving.replicas.node_bundles import Source, check_version, place_of
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.scheduling.job import Cancelled, End, Event, Finished, Job, Progress, Refused
from ditc.runtime.serving.scheduling.observer import Observer
from ditc.runtime.serving.scheduling.policy import BatchKey
from ditc.runtime.serving.settings import Bounds
from ditc.runtime.version import __version__

log = logging.getLogger(__name__)

# The front counts and bounds the accepted work, over all replicas.
_UNBOUNDED = Bounds(requests=2**62, pixel_steps=2**62)
# Progress is sent at most so often: a message takes about a millisecond of both processes, and with 50 a second, two
# replicas on two cores drew only 1.77 times as many pictures as one.
_PROGRESS_SECONDS = 0.1
# Messages of pixels that the front has not taken yet: two, so that one is made while another is on its way.
PARTS_AHEAD = 2
# Measurements that wait to be fetched by the front.
_MOST_HAPPENED = 4096
# A replica that no front asks about for so long ends itself, so that none is left behind on a cluster.
LEASE_SECONDS = 60.0


class Replica:
    """What a replica's process runs. All its methods are called on one event loop.

    Args:
        lease_seconds: as LEASE_SECONDS; 0 for a replica that does not end itself.
    """

    def __init__(self, lease_seconds: float = LEASE_SECONDS) -> None:
        self._models: dict[Version, Model] = {}
        self._opened: dict[Version, Opened] = {}
        self._jobs: dict[str, tuple[Model, Job]] = {}
        self._checked: set[str] = set()  # requests that are being checked, and are not cancelled
        self._sending: dict[str, asyncio.Semaphore] = {}  # done requests, and how many parts may be sent
        self._watch = Watch()
        self._opening = threading.Lock()
        self._heard = monotonic()
        if lease_seconds:
            threading.Thread(target=self._end_alone, args=(lease_seconds,), daemon=True).start()

    async def begin(self) -> Message:
        """Who this is. Requests of an earlier front are ended: nobody waits for them any more."""
        self._heard = monotonic()
        self._checked.clear()
        for model, job in list(self._jobs.values()):
            model.scheduler.cancel(job)
        for id in list(self._sending):
            self._stop_sending(id)
        return {
            "pid": os.getpid(),
            "cpus": sorted(allowed_cpus()),
            "ditc": __version__,
            "versions": list(self._opened),
        }

    async def pin(self, cpus: Collection[int]) -> None:
        """Run all threads of this process on these CPUs alone."""
        if hasattr(os, "sched_setaffinity"):
            for thread in Path("/proc/self/task").iterdir():
                with suppress(OSError):  # it has ended
                    os.sched_setaffinity(int(thread.name), cpus)

    async def open(self, version: Version, bundle: Bundle, source: Source) -> Opened | Message:
        """Open a version of a bundle beside those that are open. Returns the error as a message if it cannot be.

        Args:
            source: where this node gets the bundle from if it has none.
        """
        try:
            return await asyncio.to_thread(self._open, version, bundle, source)
        except DitcError as error:
            return plain_error(error)
        except Exception as error:  # of a library
            log.exception("%s cannot be opened", version)
            text = f"{bundle.path} cannot be opened: {type(error).__name__}: {error}"
            return plain_error(SessionError(text, hint="try it alone with ditc verify BUNDLE --run"))

    async def close(self, version: Version) -> None:
        """End the requests of a version, and close it."""
        self._opened.pop(version, None)
        model = self._models.pop(version, None)
        if model is not None:
            await asyncio.to_thread(model.scheduler.close)

    async def cancel(self, id: str) -> None:
        """End a request before its next step. Nothing happens if it has ended."""
        self._checked.discard(id)
        if id in self._jobs:
            model, job = self._jobs[id]
            model.scheduler.cancel(job)
        self._stop_sending(id)

    async def taken(self, id: str) -> None:
        """The front has taken a message of pixels. Nothing happens if the request has ended."""
        if id in self._sending:
            self._sending[id].release()

    async def draw(self, asked: Message) -> AsyncIterator[Message]:
        """Draw a request: progress, previews, and exactly one end.

        The pixels of large pictures and of videos come before the end, in messages of their own. At most PARTS_AHEAD of
        them are sent before `taken` is called.

        Args:
            asked: id, version, request (a message), timeout and previews, as `Scheduler.submit` takes them.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        id, model = asked["id"], self._models.get(asked["version"])
        if model is None:
            yield {"kind": "not_open"}
            return
        self._checked.add(id)
        try:
            if not self._jobs:
                self._watch.moved()
            submitting = asyncio.ensure_future(
                asyncio.to_thread(
                    model.submit,
                    request_of_message(asked["request"]),
                    listen,
                    id=id,
                    timeout=asked["timeout"],
                    previews=asked["previews"],
                )
            )
            try:
                job = await asyncio.shield(submitting)
            except asyncio.CancelledError:  # the thread goes on
                submitting.add_done_callback(partial(_cancel_submitted, model))
                raise
        except Refusal as refusal:
            yield _one_message(Refused(refusal))
            return
        except UsageError as error:
            yield _one_message(Refused(Invalid(str(error), hint=error.hint)))
            return
        finally:
            wanted = id in self._checked
            self._checked.discard(id)
        self._jobs[id] = model, job
        if not wanted:
            model.scheduler.cancel(job)
        sent = -_PROGRESS_SECONDS
        try:
            while True:
                event = await events.get()
                if isinstance(event, Progress):
                    if monotonic() - sent < _PROGRESS_SECONDS:
                        continue
                    sent = monotonic()
                if isinstance(event, End):
                    end = Cancelled() if isinstance(event, Finished) and job.cancelled else event
                    break
                for message in messages_of_event(event):
                    yield message
        finally:
            self._jobs.pop(id, None)
            model.scheduler.cancel(job)
        async with aclosing(self._send(id, end)) as messages:
            async for message in messages:
                yield message

    async def _send(self, id: str, end: End) -> AsyncGenerator[Message, None]:
        """The messages of an end, as fast as the front takes them. It is cancelled if nobody wants it any more."""
        room = self._sending[id] = asyncio.Semaphore(PARTS_AHEAD)
        try:
            for message in messages_of_event(end):
                if message["kind"] == "pixels":
                    await room.acquire()
                if id not in self._sending:
                    yield _one_message(Cancelled())
                    return
                yield message
        finally:
            self._sending.pop(id, None)

    def _stop_sending(self, id: str) -> None:
        if (room := self._sending.pop(id, None)) is not None:
            room.release()

    async def health(self) -> Message:
        """What has happened since the last call, and for how long nothing has although there is work."""
        self._heard = monotonic()
        busy = self._jobs and not any(model.scheduler.problem for model in self._models.values())
        return {
            "stuck": self._watch.still_seconds() if busy else 0.0,
            "happened": self._watch.take(),
            "times": {version: model.scheduler.times.snapshot() for version, model in self._models.items()},
        }

    def _open(self, version: Version, bundle: Bundle, source: Source) -> Opened:
        with self._opening:  # so that each sees the memory that is left
            if version in self._opened:
                return self._opened[version]
            path = place_of(Path(bundle.path), version, source)
            try:
                model = open_model(
                    version.name,
                    path,
                    load=bundle.load,
                    admission=Admission(_UNBOUNDED),
                    scheduled=bundle.scheduled,
                    observer=_Watched(self._watch, version),
                    warm_up_seconds=bundle.warm_up_seconds,
                    lora=bundle.lora,
                )
            except BundleError as e:
                if path == Path(bundle.path):
                    raise
                hint = f"if it is damaged, remove {path.parent} on that node, and it is fetched again"
                raise BundleError(str(e), hint=hint) from e
            try:
                check_version(path, version, model.digest)
            except BaseException:
                model.scheduler.close()
                raise
            self._models[version], self._opened[version] = model, _opened(model, path)
            return self._opened[version]

    def _end_alone(self, seconds: float) -> None:
        while monotonic() - self._heard < seconds:
            sleep(1.0)
        os._exit(0)


class Watch:
    """When a replica has moved last, and what its schedulers have measured. Threads can share it."""

    def __init__(self) -> None:
        self._moved = monotonic()
        self._happened: deque[Message] = deque(maxlen=_MOST_HAPPENED)

    def moved(self) -> None:
        """Something was done."""
        self._moved = monotonic()

    def note(self, version: Version, what: str, *values: object) -> None:
        """Something was done that the front measures."""
        self.moved()
        self._happened.append({"version": version, "what": what, "values": values})

    def still_seconds(self) -> float:
        """For how long nothing was done."""
        return monotonic() - self._moved

    def take(self) -> list[Message]:
        """What was noted since the last call."""
        taken: list[Message] = []
        with suppress(IndexError):
            while True:
                taken.append(self._happened.popleft())
        return taken


class _Watched(Observer):
    def __init__(self, watch: Watch, version: Version) -> None:
        self._watch, self._version = watch, version

    def stage(self, name: str, seconds: float) -> None:
        self._watch.note(self._version, "stage", name, seconds)

    def stepped(self, key: BatchKey, size: int, seconds: float) -> None:
        self._watch.note(self._version, "stepped", key, size, seconds)

    def ended(self, job: Job, end: End) -> None:
        self._watch.moved()

    def crashed(self) -> None:
        self._watch.note(self._version, "crashed")


def _cancel_submitted(model: Model, submitting: asyncio.Future[Job]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        model.scheduler.cancel(submitting.result())


def _one_message(event: Refused | Cancelled) -> Message:
    (message,) = messages_of_event(event)
    return message


def _opened(model: Model, place: Path) -> Opened:
    pipeline, scheduler = model.pipeline, model.scheduler
    return Opened(
        place=str(place),
        stages={name: (session.spec, session.device) for name, session in pipeline.sessions.items()},
        backend=pipeline.backend,
        precision=pipeline.precision,
        uncertified=pipeline.uncertified,
        chosen=pipeline.chosen,
        loras=pipeline.loras_in_weights(),
        max_batch=scheduler.max_batch,
        sizes=scheduler.times.buckets,
        size_bytes=model.size_bytes,
        times=scheduler.times.snapshot(),
    )
