"""The simulation of benchmarks/capacity.py: arrivals, and replicas on a virtual clock.

A replica is the server's real queue, admission, policy and step times (runtime/serving/scheduling). Only the work
itself is replaced: it takes a time that is drawn from measured ones.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ditc.runtime.serving.refusals import Overloaded
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.scheduling.job import Job
from ditc.runtime.serving.scheduling.policy import BatchKey, choose, due_time
from ditc.runtime.serving.scheduling.queue import Queue
from ditc.runtime.serving.scheduling.scheduler import READY_BATCHES
from ditc.runtime.serving.scheduling.step_times import StepTimes
from ditc.runtime.serving.settings import Bounds

# The mix of requests: steps, and how many of a hundred.
MIX = ((4, 75), (20, 25))
SIDE = 128
KEY = BatchKey(latents=(1, SIDE, SIDE), rows=2)


@dataclass(frozen=True)
class Times:
    """Measured seconds. Each list holds one number per measured request.

    Attributes:
        text, step, decode: of one picture, on the server's thread.
        around: what HTTP, PNG and the client add.
    """

    text: list[float]
    step: list[float]
    decode: list[float]
    around: list[float]

    def mean_service(self) -> float:
        """The mean time that a request of the mix keeps a replica busy."""
        steps = sum(steps * share for steps, share in MIX) / 100
        return statistics.mean(self.text) + steps * statistics.mean(self.step) + statistics.mean(self.decode)


@dataclass(frozen=True)
class Arrival:
    """A request of a trace: when it comes, in seconds, and its number of steps.

    Attributes:
        own: the times of this very request in a real run, one number each; None draws from those of others.
    """

    at: float
    steps: int
    own: Times | None = None


def arrivals(kind: str, rate: float, seconds: float, seed: int = 0) -> list[Arrival]:
    """A trace with a mean of `rate` requests per second.

    poisson: independent arrivals. bursts: Poisson whose rate is 3 times the mean for 5 s of every 20 s, and a third of
    it otherwise (3 * 5 + 15 / 3 = 20). diurnal: Poisson whose rate follows 1 - 0.8 cos over the whole trace, as a day.
    """
    rng, found, now = random.Random(seed), list[Arrival](), 0.0
    factor = {
        "poisson": lambda at: 1.0,
        "bursts": lambda at: 3.0 if at % 20 < 5 else 1 / 3,
        "diurnal": lambda at: 1 - 0.8 * math.cos(2 * math.pi * at / seconds),
    }[kind]
    highest = {"poisson": 1.0, "bursts": 3.0, "diurnal": 1.8}[kind]
    # Thinning: Lewis and Shedler, "Simulation of nonhomogeneous Poisson processes by thinning", 1979.
    while True:
        now += rng.expovariate(rate * highest)
        if now >= seconds:
            return found
        if rng.random() * highest < factor(now):
            steps = rng.choices([s for s, _ in MIX], [share for _, share in MIX])[0]
            found.append(Arrival(now, steps))


class Replica:
    """One server on a virtual clock: what `Scheduler` does on a CPU, where one thread does all of the work."""

    def __init__(self, times: Times, rng: random.Random, *, max_batch: int, max_queue: int) -> None:
        self._times, self._rng = times, rng
        self._admission = Admission(Bounds(requests=max_queue, pixel_steps=sys.maxsize))
        self.queue = Queue(self._admission, READY_BATCHES * max_batch)
        self._step_times = StepTimes(max_batch)
        self._text, self._step, self._decode = map(statistics.fmean, (times.text, times.step, times.decode))
        self._step_times.record(KEY, 1, self._step)
        self.busy = False

    @property
    def open_requests(self) -> int:
        return self._admission.requests

    def submit(self, now: float, arrival: Arrival, ended: Any) -> bool:
        """Accept or reject a request. `ended` is called with the time of its end."""
        plan: Any = SimpleNamespace(
            drawn_height=SIDE,
            drawn_width=SIDE,
            frames=None,
            table=range(arrival.steps),
            pictures=1,
            times=arrival.own or self._times,
        )
        try:
            self._admission.take(SIDE * SIDE * arrival.steps, seconds_of_all=1.0)
        except Overloaded:
            return False
        alone = self._text + arrival.steps * self._step + self._decode
        job = Job(id="", plan=plan, listener=ended, arrived=now, due=due_time(now, alone, None))
        self.queue.add_job(job)
        self.queue.add_task(job, lambda: ("text", job), makes_ready=True)  # type: ignore[arg-type, return-value]
        return True

    def work(self, now: float) -> tuple[float, Any] | None:
        """What it does next, as `Scheduler._next` decides: the seconds, and what to do at their end with the time."""
        best, waiting = self._step_times.best_size, self.queue.waiting()
        task = self.queue.take_task(best, waiting)
        if task is not None:
            part, job = task.action()  # type: ignore[misc]
            if part == "text":
                return self._rng.choice(job.plan.times.text), lambda end: self._encoded(job, end)
            return self._rng.choice(job.plan.times.decode), lambda end: self._decoded(job, end)
        chosen = choose(waiting, now, best)
        if not chosen.ids:
            return None
        pictures: list[Any] = self.queue.take_pictures(chosen.ids)
        seconds = self._rng.choice(pictures[0].job.plan.times.step)  # they run one by one, as max_batch is 1
        return seconds, lambda end: self._stepped(pictures)

    def _encoded(self, job: Job, end: float) -> None:
        picture: Any = SimpleNamespace(
            number=self.queue.next_number(),
            job=job,
            key=KEY,
            since=end,
            started=False,
            left=len(job.plan.table),
        )
        self.queue.add_picture(picture)

    def _stepped(self, pictures: Sequence[Any]) -> None:
        for picture in pictures:
            picture.started, picture.left = True, picture.left - 1
            if picture.left:
                self.queue.add_picture(picture)
            else:
                job = picture.job
                self.queue.add_task(job, lambda job=job: ("decode", job))  # type: ignore[misc, arg-type, return-value]

    def _decoded(self, job: Job, end: float) -> None:
        self.queue.remove_job(job)
        job.listener(end)  # type: ignore[arg-type]


def simulate(
    trace: Sequence[Arrival], times: Times, replicas: int, *, max_queue: int = 64, seed: int = 1
) -> dict[str, float]:
    """Latencies and rejections of a trace. Pictures run one at a time, as `ditc serve --max-batch 1` runs them."""
    rng = random.Random(seed)
    servers = [Replica(times, rng, max_batch=1, max_queue=max_queue) for _ in range(replicas)]
    latencies: list[float] = []
    rejected, last, order = 0, 0.0, itertools.count()
    # What happens when: arrivals, and ends of work.
    events: list[tuple[float, int, Any]] = [(each.at, next(order), each) for each in trace]
    heapq.heapify(events)
    least = [(0, i) for i in range(replicas)]  # by open requests, with entries that may be out of date
    heapq.heapify(least)

    def begin(server: Replica, now: float) -> None:
        work = None if server.busy else server.work(now)
        if work is not None:
            server.busy = True
            heapq.heappush(events, (now + work[0], next(order), (server, work[1])))

    while events:
        now, _, event = heapq.heappop(events)
        last = now
        if isinstance(event, Arrival):
            while True:  # find an entry that is still true
                count, index = heapq.heappop(least)
                if servers[index].open_requests == count:
                    break
                heapq.heappush(least, (servers[index].open_requests, index))
            server = servers[index]

            around = rng.choice((event.own or times).around)

            def ended(end: float, begun: float = now, index: int = index, around: float = around) -> None:
                latencies.append(end - begun + around)
                heapq.heappush(least, (servers[index].open_requests, index))

            if not server.submit(now, event, ended):
                rejected += 1
            heapq.heappush(least, (server.open_requests, index))
            begin(server, now)
        else:
            server, finish = event
            server.busy = False
            finish(now)
            begin(server, now)
    return described(latencies, rejected, last)


def described(latencies: Sequence[float], rejected: int, seconds: float) -> dict[str, float]:
    """Quantiles in seconds, the rejected share, and pictures per second."""
    ordered = sorted(latencies)

    def quantile(share: float) -> float:
        return (
            round(ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)], 4)
            if ordered
            else math.nan
        )

    total = len(ordered) + rejected
    return {
        "requests": total,
        "mean_s": round(statistics.fmean(ordered), 4) if ordered else math.nan,
        "p50_s": quantile(0.5),
        "p99_s": quantile(0.99),
        "rejected": round(rejected / total, 4) if total else 0.0,
        "pictures_per_s": round(len(ordered) / seconds, 3) if seconds else 0.0,
    }
