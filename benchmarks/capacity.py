"""How many replicas does a load need? Replays arrivals against measured times, with the server's own policy.

    python -m benchmarks.capacity measure --bundle BUNDLE       times of one server's parts, into capacity-times.json
    python -m benchmarks.capacity simulate --load 0.7           p50, p99, rejections and cost for 1 to 1,000 replicas
    python -m benchmarks.capacity simulate --rate 20 --trace bursts --replicas 2 3 4
    python -m benchmarks.capacity check --bundle BUNDLE         predictions beside real servers, for 1 and 2 replicas

A replica of the simulation is the server's real queue, admission, policy and step times (runtime/serving/scheduling)
on a virtual clock. Only the work itself is replaced: it takes a time that is drawn from the measured ones. A balancer
gives every request to the replica with the fewest open requests.

`measure` and `check` start `ditc serve` processes with one thread each on the loopback interface. `check` replays one
trace against them and in the simulation.
"""

from __future__ import annotations

import argparse
import heapq
import http.client
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.machine import write
from ditc.runtime.atomic import write_atomic
from ditc.runtime.serving.refusals import Overloaded
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.scheduling.job import Job
from ditc.runtime.serving.scheduling.policy import BatchKey, choose, due_time
from ditc.runtime.serving.scheduling.queue import Queue
from ditc.runtime.serving.scheduling.scheduler import READY_BATCHES
from ditc.runtime.serving.scheduling.step_times import StepTimes
from ditc.runtime.serving.settings import Bounds

TIMES = Path("build/capacity-times.json")
# The mix of requests: steps, and how many of a hundred.
MIX = ((4, 75), (20, 25))
SIDE = 128
REPLICAS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
OPTIONS = ("--port", "0", "--threads", "1", "--max-batch", "1", "--json")
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


# --- traces


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
    while (
        True
    ):  # thinning: Lewis and Shedler, "Simulation of nonhomogeneous Poisson processes by thinning", 1979
        now += rng.expovariate(rate * highest)
        if now >= seconds:
            return found
        if rng.random() * highest < factor(now):
            steps = rng.choices([s for s, _ in MIX], [share for _, share in MIX])[0]
            found.append(Arrival(now, steps))


# --- the simulation


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


# --- real servers


@contextmanager
def servers(bundle: Path, count: int) -> Iterator[list[str]]:
    """`ditc serve` processes, and their addresses as host:port."""
    with ExitStack() as stack:
        started = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-m", "ditc.runtime.cli", "serve", str(bundle), *OPTIONS],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            started.append(process)
        found = []
        for process in started:
            assert process.stdout is not None
            found.append(urllib.parse.urlsplit(json.loads(process.stdout.readline())["url"]).netloc)
        yield found


def ask(address: str, steps: int, number: int) -> tuple[float, dict[str, float] | None]:
    """Draw one picture. The seconds, and those of its parts; None if it was rejected."""
    body = json.dumps({"prompt": f"a red heart {number}", "num_inference_steps": steps, "seed": number})
    connection = http.client.HTTPConnection(address, timeout=120)
    begin = time.perf_counter()
    connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    seconds = time.perf_counter() - begin
    connection.close()
    return seconds, json.loads(content)["ditc"]["seconds"] if answer.status == 200 else None


def measured(addresses: Sequence[str], each: int = 24) -> Times:
    """The times of the servers' parts, with one request at a time on every server, all servers at once."""
    times = Times([], [], [], [])

    def run(index: int, address: str) -> None:
        for number in range(each):
            steps = MIX[number % 2][0]
            seconds, parts = ask(address, steps, 100_000 * (index + 1) + number)
            assert parts is not None
            if number >= 2:  # the first ones warm up
                times.text.append(parts["text"])
                times.step.append(parts["denoise"] / steps)
                times.decode.append(parts["decode"])
                times.around.append(seconds - parts["total"])

    together([lambda i=i, a=a: run(i, a) for i, a in enumerate(addresses)])  # type: ignore[misc]
    return times


def together(calls: Sequence[Any]) -> None:
    """Run the calls in threads of their own, and wait for their ends."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def replayed(trace: Sequence[Arrival], addresses: Sequence[str]) -> tuple[dict[str, float], list[Arrival]]:
    """Latencies and rejections of real servers, and the trace with the times that each request took of them.

    A request goes to the server with the fewest open ones.
    """
    lock, opened, timed = threading.Lock(), [0] * len(addresses), list(trace)
    latencies: list[float] = []
    rejected, begin = 0, time.perf_counter()

    def send(number: int, arrival: Arrival) -> None:
        nonlocal rejected
        with lock:
            index = opened.index(min(opened))
            opened[index] += 1
        seconds, parts = ask(addresses[index], arrival.steps, number)
        with lock:
            opened[index] -= 1
            if parts is None:
                rejected += 1
            else:
                latencies.append(seconds)
                around = seconds - parts["total"]
                own = Times([parts["text"]], [parts["denoise"] / arrival.steps], [parts["decode"]], [around])
                timed[number] = replace(arrival, own=own)

    threads = []
    for number, arrival in enumerate(trace):
        time.sleep(max(0.0, begin + arrival.at - time.perf_counter()))
        threads.append(threading.Thread(target=send, args=(number, arrival)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return described(latencies, rejected, time.perf_counter() - begin), timed


def check(bundle: Path, load: float, seconds: float) -> dict[str, Any]:
    """Predictions beside real runs, for 1 and 2 replicas.

    "forecast" knows only times from before the run, so its error is also that of a machine whose speed changes.
    "model" knows how long the parts of each request took in the run, and predicts what waiting makes of that.
    """
    found: dict[str, Any] = {"load": load, "seconds": seconds, "mix": MIX}
    for count in (1, 2):
        with servers(bundle, count) as addresses:
            before = measured(addresses)
            trace = arrivals("poisson", load * count / before.mean_service(), seconds, seed=count)
            real, timed = replayed(trace, addresses)
        row: dict[str, Any] = {"real": real, "mean_service_before_s": round(before.mean_service(), 4)}
        for name, arrived in (("forecast", trace), ("model", timed)):
            row[name] = simulate(arrived, before, count)
            for quantile in ("p50", "p99"):
                error = row[name][f"{quantile}_s"] / real[f"{quantile}_s"] - 1
                row[name][f"{quantile}_error"] = round(error, 3)
        found[f"{count} replicas"] = row
        print(json.dumps(found[f"{count} replicas"]), file=sys.stderr)
    return found


def table(times: Times, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of replicas."""
    rows = []
    for replicas in arguments.replicas:
        rate = arguments.rate or arguments.load * replicas / times.mean_service()
        seconds = min(arguments.seconds, arguments.most_requests / rate)
        trace = arrivals(arguments.trace, rate, seconds, arguments.seed)
        row: dict[str, Any] = {
            "replicas": replicas,
            "rate": round(rate, 2),
            **simulate(trace, times, replicas),
        }
        served = row["pictures_per_s"] * 3600
        row["cost_per_1000"] = round(1000 * replicas * arguments.price / served, 4) if served else math.nan
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def main() -> None:
    """Run one of the three verbs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    busy = "Share of the replicas' time that the requests need."
    for name in ("measure", "check"):
        verbs.add_parser(name).add_argument("--bundle", type=Path, default=Path("build/demo/bundle"))
    verbs.choices["check"].add_argument("--load", type=float, default=0.6, help=busy)
    verbs.choices["check"].add_argument("--seconds", type=float, default=60.0)
    sim = verbs.add_parser("simulate")
    sim.add_argument("--times", type=Path, default=TIMES)
    sim.add_argument("--trace", choices=["poisson", "bursts", "diurnal"], default="poisson")
    sim.add_argument("--rate", type=float, help="Requests per second (default: by --load, for each row).")
    sim.add_argument("--load", type=float, default=0.7, help=busy)
    sim.add_argument("--seconds", type=float, default=600.0)
    sim.add_argument(
        "--most-requests", type=int, default=20_000, help="Ends the trace after so many requests."
    )
    sim.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    sim.add_argument(
        "--price", type=float, default=1.0, help="Price of an hour of one replica, in any currency."
    )
    sim.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.verb == "measure":
        with servers(arguments.bundle, 1) as addresses:
            print(write_atomic(TIMES, json.dumps(asdict(measured(addresses)))))
    elif arguments.verb == "check":
        print(write("capacity_check", check(arguments.bundle, arguments.load, arguments.seconds)))
    else:
        times = Times(**json.loads(arguments.times.read_bytes()))
        print(write(f"capacity_{arguments.trace}", {"times": asdict(times), "rows": table(times, arguments)}))


if __name__ == "__main__":
    main()
