"""Keeps replicas alive: starts, checks, replaces and ends them, and opens versions of bundles in all of them.

Everything happens on one event loop, on a thread of its own. Other threads call the methods of the first section.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from math import ceil, inf
from time import monotonic
from typing import Any, TypeVar

from ditc.runtime.errors import DitcError
from ditc.runtime.serving.log_text import where_raised
from ditc.runtime.serving.replicas.dispatcher import Dispatcher
from ditc.runtime.serving.replicas.handle import Bundle, Cluster, ReplicaLost
from ditc.runtime.serving.replicas.messages import Message, Opened, Version
from ditc.runtime.serving.replicas.options import ReplicaOptions
from ditc.runtime.serving.replicas.remote_scheduler import RemoteScheduler
from ditc.runtime.serving.replicas.seat import Seat, Task
from ditc.runtime.serving.scheduling.job import Job
from ditc.runtime.version import __version__

log = logging.getLogger(__name__)

_TICK = 0.1
CHECK_SECONDS = 1.0
# Seconds before the next start, by how many replicas in a row have ended before they were ready; and before a replica
# tries again to open what it could not, by how often it has tried.
START_PAUSES = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
# After so many of them, a bundle cannot be opened.
_GIVE_UP = 3
# How long a replica that an earlier front has left has to answer.
_ADOPT_SECONDS = 5.0
# How long `stop` waits for the ends of replicas.
_STOP_SECONDS = 5.0

R = TypeVar("R")


class Pool:
    """The replicas of one server. `start` begins, `stop` ends them."""

    def __init__(
        self, cluster: Cluster, options: ReplicaOptions, *, clock: Callable[[], float] = monotonic
    ) -> None:
        self.seats: list[Seat] = []
        self._cluster, self._options, self._clock = cluster, options, clock
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="ditc-replicas", daemon=True)
        self._dispatcher = Dispatcher(self.seats, lost=self._lost, clock=clock)
        self._bundles: dict[Version, Bundle] = {}  # what every replica is to have open
        self._opened: dict[Version, Opened] = {}
        self._users: Counter[Version] = Counter()  # a version may be served again while its old requests end
        self._schedulers: dict[Version, RemoteScheduler] = {}
        self._changed = asyncio.Event()
        self._failures, self._start_at = 0, 0.0
        self._start_error: DitcError | None = None
        self._enough_since: float | None = None  # since when fewer replicas would do
        self._background: set[asyncio.Task[None]] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._stopping = False

    # --- what other threads call

    def start(self) -> None:
        """Take over the replicas that an earlier front has left, and start those that are missing."""
        self._thread.start()
        self._call(self._adopt())

        async def begin() -> None:
            self._keeping = self._spawn(self._keep_alive())

        self._call(begin())

    def stop(self) -> None:
        """End all replicas."""

        async def end(keeping: asyncio.Task[None]) -> None:
            self._stopping = True
            for seat in list(self.seats):
                self._end(seat)
            if left := self._background - {keeping}:
                await asyncio.wait(left, timeout=_STOP_SECONDS)
            for task in self._background:
                task.cancel()

        if self._keeping is None:
            return
        self._call(end(self._keeping))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def serving(self, version: Version) -> int:
        """How many replicas can draw with this version now."""
        return sum(seat.ready and not seat.ending and version in seat.versions for seat in list(self.seats))

    def open_version(self, version: Version, bundle: Bundle) -> Opened:
        """Open a version in all replicas, one after the other if an earlier one is in use.

        Raises:
            DitcError: a replica cannot open it, or none can be started. Then it stays open in none.
        """
        return self._call(self._open_version(version, bundle))

    def register(self, scheduler: RemoteScheduler) -> None:
        """Report to this scheduler what replicas measure of its version."""
        self._schedulers[scheduler.version] = scheduler

    def close_version(self, version: Version) -> None:
        """Close a version in all replicas, unless it was opened once more, without waiting for it."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._leave, version)

    def add(self, task: Task) -> None:
        """Draw an accepted request."""
        self._loop.call_soon_threadsafe(self._dispatcher.add, task)

    def cancel(self, job: Job) -> None:
        """End a request."""
        self._loop.call_soon_threadsafe(self._dispatcher.cancel, job)

    def _call(self, work: Coroutine[Any, Any, R]) -> R:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    # --- lives of replicas

    async def _adopt(self) -> None:
        for handle in await asyncio.to_thread(self._cluster.existing):
            try:
                told = await asyncio.wait_for(handle.begin(), _ADOPT_SECONDS)
            except (ReplicaLost, TimeoutError):
                self._cluster.kill(handle, {})
                continue
            except Exception as e:  # of Ray, or of the replica; the server can start without it
                log.error("%s failed, and is ended:\n%s", handle.name, where_raised(e))
                self._cluster.kill(handle, {})
                continue
            if told["ditc"] != __version__:  # installed since then
                log.info("%s has ditc %s, and is ended", handle.name, told["ditc"])
                self._cluster.kill(handle, told)
                continue
            seat = Seat(handle=handle, told=told, left_over=set(told["versions"]))
            self.seats.append(seat)
            log.info("%s goes on", seat.name)
            self._spawn(self._bring_up(seat))

    async def _keep_alive(self) -> None:
        while not self._stopping:
            try:
                self._dispatcher.end_hopeless()
                self._scale()
                for seat in list(self.seats):
                    if seat.told and not seat.checking and self._clock() >= seat.next_check:
                        seat.checking = True
                        self._spawn(self._check(seat))
                    if seat.ready and seat.failed and self._clock() >= seat.open_again:
                        seat.open_again = inf
                        self._spawn(self._open_failed(seat))
                self._dispatcher.dispatch()
            except Exception as e:  # the loop must not end: it serves all clients
                log.error("the pool of replicas failed:\n%s", where_raised(e))
            await asyncio.sleep(_TICK)

    def _scale(self) -> None:
        """Start the replicas that are missing, and end those that are not needed any more."""
        options, now = self._options, self._clock()
        wanted = ceil(self._dispatcher.pixel_steps / options.pixel_steps)
        wanted = min(max(wanted, options.least), options.most)
        staying = [seat for seat in self.seats if not seat.ending]
        if len(staying) < wanted and now >= self._start_at:
            for _ in range(wanted - len(staying)):
                seat = Seat(handle=self._cluster.spawn())
                log.info("%s is started", seat.name)
                self.seats.append(seat)
                self._spawn(self._bring_up(seat))
        if len(staying) <= wanted:
            self._enough_since = None
        elif self._enough_since is None:
            self._enough_since = now
        elif now - self._enough_since >= options.idle_seconds:
            min(staying, key=lambda seat: (seat.ready, seat.left)).ending = True
            self._enough_since = None
        for seat in [seat for seat in self.seats if seat.ending and not seat.tasks]:
            log.info("%s is not needed any more", seat.name)
            self._end(seat)

    async def _bring_up(self, seat: Seat) -> None:
        """Open in a new replica all that the others have open; then it gets requests."""
        try:
            seat.told = seat.told or await seat.handle.begin()
            if seat.told["ditc"] != __version__:
                self._start_error = DitcError(
                    f"a node has ditc {seat.told['ditc']}, and this is {__version__}",
                    hint="install the same version on all nodes",
                )
                self._lost(seat, str(self._start_error))
                return
            await self._pin(seat)
            while not seat.gone and (missing := self._missing_in(seat)):
                with suppress(DitcError):
                    await self._open_in(seat, missing[0])
        except ReplicaLost as e:
            self._lost(seat, str(e))
        except Exception as e:  # of Ray; one that is neither ready nor lost would keep the place of another
            log.error("%s failed at its start:\n%s", seat.name, where_raised(e))
            self._lost(seat, f"{type(e).__name__} at its start")
        if seat.gone:
            return
        seat.ready = True
        self._failures, self._start_error = 0, None
        log.info("%s is ready: process %d", seat.name, seat.told["pid"])
        self._changed.set()
        self._dispatcher.dispatch()

    def _missing_in(self, seat: Seat) -> list[Version]:
        return [v for v in self._bundles if v not in seat.versions and v not in seat.failed]

    async def _pin(self, seat: Seat) -> None:
        """Give a replica that computes on a CPU cores of its own, if its node has as many left."""
        count, here = self._options.cpus, seat.told["node"]
        taken = {c for other in self.seats if other.told.get("node") == here for c in other.cpus}
        free = [cpu for cpu in seat.told["cpus"] if cpu not in taken]
        if seat.cpus or self._options.gpus or len(free) < count:
            return
        seat.cpus = tuple(free[:count])
        await seat.handle.pin(seat.cpus)

    async def _check(self, seat: Seat) -> None:
        """Ask a replica whether it is well, and take what it has measured."""
        patience = self._options.hang_seconds
        try:
            told = await asyncio.wait_for(seat.handle.health(), patience)
            if told["stuck"] > patience:
                self._lost(seat, f"it has made no progress for {told['stuck']:.0f} s")
            else:
                self._take(told)
        except ReplicaLost as e:
            self._lost(seat, str(e))
        except TimeoutError:
            self._lost(seat, f"it has not answered for {patience:g} s")
        finally:
            seat.checking, seat.next_check = False, self._clock() + CHECK_SECONDS

    def _take(self, told: Message) -> None:
        for one in told["happened"]:
            if one["version"] in self._schedulers:
                getattr(self._schedulers[one["version"]].observer, one["what"])(*one["values"])
        for version, times in told["times"].items():
            if version in self._schedulers:
                self._schedulers[version].times.take_over(times)

    def _lost(self, seat: Seat, why: str) -> None:
        """Replace a replica that has ended or must be. Its requests go to others."""
        if seat.gone:
            return
        log.error("%s is lost: %s", seat.name, why)
        if seat.ready:
            self._failures = 0
        else:
            self._failures += 1
            if self._failures >= _GIVE_UP and self._start_error is None:
                self._start_error = DitcError(
                    f"{self._failures} replicas in a row have ended at their start: {why}",
                    hint="look at the log of Ray, in /tmp/ray/session_latest/logs",
                )
        pause = START_PAUSES[min(self._failures, len(START_PAUSES) - 1)]
        self._start_at = self._clock() + pause
        self._end(seat)
        self._changed.set()

    def _end(self, seat: Seat) -> None:
        seat.gone, seat.ready = True, False
        if seat in self.seats:
            self.seats.remove(seat)
        drawing = [task.drawing for task in seat.tasks if task.drawing is not None]
        self._spawn(asyncio.to_thread(self._cluster.kill, seat.handle, seat.told))
        for one in drawing:
            if one is not asyncio.current_task():
                one.cancel()

    # --- versions of bundles

    async def _open_version(self, version: Version, bundle: Bundle) -> Opened:
        earlier = any(one.name == version.name and one != version for one in self._bundles)
        self._bundles[version] = bundle
        self._users[version] += 1
        for seat in self.seats:
            seat.failed.pop(version, None)
        try:
            while True:
                ready = [seat for seat in self.seats if seat.ready]
                if error := next((seat.failed[version] for seat in ready if version in seat.failed), None):
                    raise error
                missing = [seat for seat in ready if version not in seat.versions]
                if earlier:
                    for seat in missing:
                        await self._open_in(seat, version)
                else:
                    await asyncio.gather(*(self._open_in(seat, version) for seat in missing))
                if version in self._opened:
                    self._dispatcher.dispatch()
                    return self._opened[version]
                if self._start_error is not None:
                    raise self._start_error
                self._changed.clear()
                await self._changed.wait()
        except BaseException:
            self._leave(version)
            raise

    async def _open_in(self, seat: Seat, version: Version) -> None:
        """Open a version in one replica. Raises DitcError if it cannot be; a replica that is lost is replaced."""
        bundle = self._bundles[version]
        if version not in seat.left_over:
            while seat.left_over:  # nobody has planned memory for them
                await self._close_in(seat, seat.left_over.pop())
        seat.left_over.discard(version)
        try:
            opened = await seat.handle.open(version, bundle)
            if opened.loras != self._opened.get(version, opened).loras:
                await seat.handle.close(version)
                raise DitcError(
                    f"the LoRA of {version.name} is another file on this node",
                    hint="copy it to all nodes, under the same path",
                )
        except ReplicaLost as e:
            self._lost(seat, str(e))
            return
        except DitcError as e:
            seat.failed[version] = e
            log.error("%s cannot open %s: %s", seat.name, version, e)
            raise
        seat.failed.pop(version, None)
        if version not in self._bundles:  # closed meanwhile, or another replica could not open it
            await self._close_in(seat, version)
            return
        if opened.place != bundle.path:
            log.info("%s has %s from the front, in %s", seat.name, version, opened.place)
        seat.versions.add(version)
        self._opened[version] = opened
        self._changed.set()

    async def _open_failed(self, seat: Seat) -> None:
        """Try again what a replica could not open, because the reason may have passed, such as too little memory."""
        try:
            for version in list(seat.failed):
                if version in self._bundles and not seat.gone:
                    with suppress(DitcError):
                        await self._open_in(seat, version)
        finally:
            seat.attempts = seat.attempts + 1 if seat.failed else 0
            seat.open_again = self._clock() + START_PAUSES[min(seat.attempts, len(START_PAUSES) - 1)]

    def _leave(self, version: Version) -> None:
        """One user of a version less. After the last one it is closed."""
        self._users[version] -= 1
        if self._users[version] <= 0:
            del self._users[version]
            self._forget(version)

    def _forget(self, version: Version) -> None:
        self._bundles.pop(version, None)
        self._opened.pop(version, None)
        self._schedulers.pop(version, None)
        for seat in self.seats:
            seat.failed.pop(version, None)
            if version in seat.versions:
                seat.versions.discard(version)
                self._spawn(self._close_in(seat, version))

    async def _close_in(self, seat: Seat, version: Version) -> None:
        with suppress(ReplicaLost):
            await seat.handle.close(version)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside the rest of the loop, and keep it from being collected."""
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task
