"""What does the server add to the pipeline, and what do its order of steps and its batches gain?

    python -m benchmarks.serving [--bundle build/demo/bundle] [--only overhead mixed ...]

Real `ditc serve` processes on the loopback interface, with the settings that they have by default unless a row says
otherwise:

    cost      time between two steps that the scheduler itself takes, with 32 requests waiting
    overhead  one request at a time over HTTP beside the same request drawn by `Pipeline` in this process
    flood     200 clients at once against a queue of 8
    mixed     requests of 4 and of 50 steps: by due time beside first come, first served
    batches   eight clients that never pause: with batches beside one picture at a time

The result of each part is written as soon as it is there, beside those of the others of the same day.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
from PIL import Image

from benchmarks.machine import write
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.scheduling.job import Finished
from ditc.runtime.serving.scheduling.scheduler import Scheduler
from ditc.runtime.session import Tensor
from ditc.runtime.spec import DENOISER

PROMPT = "a red heart, flat style"
SHORT, LONG = 4, 50
# Requests are drawn in the order of their arrival if every one is due when it arrives.
FIRST_COME = "from ditc.runtime.serving.scheduling import policy; policy.STRETCH = 0.0; "
START_SECONDS = 120.0


def main() -> None:
    """Run the parts that are asked for, and write their results."""
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "cost": cost,
        "overhead": overhead,
        "flood": flood,
        "mixed": mixed,
        "batches": batches,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("build/demo/bundle"))
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in arguments.only:
        results[name] = parts[name](arguments.bundle)
        print(name, json.dumps(results[name]), file=sys.stderr)
        print(write("serving", results))


def cost(bundle: Path, waiting: int = 32, steps: int = 50) -> dict[str, Any]:
    """The gap between the end of one run of the denoiser and the beginning of the next.

    The denoiser returns what it returned once, so that nothing but the scheduler takes time.
    """
    gaps: list[float] = []
    at_once: list[int] = []

    class Instant:
        """A session whose results are always the same."""

        def __init__(self, inner: Any) -> None:
            self._inner, self.spec, self.device = inner, inner.spec, inner.device
            self._outputs: dict[int, dict[str, Tensor]] = {}
            self._ended: float | None = None

        def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            size = feeds["latents"].shape[0]
            if self._ended is not None:
                gaps.append(time.perf_counter() - self._ended)
                at_once.append(scheduler.admission.requests)
            if size not in self._outputs:
                self._outputs[size] = self._inner.run(feeds)
            self._ended = time.perf_counter()
            return dict(self._outputs[size])

        def close(self) -> None:
            self._inner.close()

    def load() -> Pipeline:
        pipeline = Pipeline.load(bundle)
        pipeline.sessions[DENOISER] = Instant(pipeline.sessions[DENOISER])
        return pipeline

    def measured(batch: int) -> dict[str, float]:
        nonlocal scheduler
        gaps.clear(), at_once.clear()
        scheduler = Scheduler(load(), admission=Admission(Bounds()), reopen=load)
        scheduler.times.best_size = lambda key, most: min(most, batch)  # type: ignore[method-assign]
        ended = threading.Semaphore(0)
        for index in range(waiting):
            request = Request(prompt=PROMPT, seed=index, num_inference_steps=steps, output_type="latent")
            scheduler.submit(
                scheduler.pipeline.plan(request),
                lambda event: ended.release() if isinstance(event, Finished) else None,
                id=str(index),
            )
        scheduler.start()
        for _ in range(waiting):
            ended.acquire()
        scheduler.close()
        full = [gap for gap, jobs in zip(gaps, at_once, strict=True) if jobs == waiting]
        return {"steps": len(full), **quantiles(full, "microseconds", 1e6)}

    scheduler: Scheduler
    return {"waiting": waiting, **{f"batches of {batch}": measured(batch) for batch in (1, 4)}}


def overhead(bundle: Path, repeats: int = 60) -> dict[str, Any]:
    """The same request, in turns, by the pipeline in this process and by a server.

    The client is Python's own, because a larger one takes part of a millisecond itself.
    """
    seconds: dict[str, list[float]] = {"pipeline": [], "pipeline and PNG": [], "server": []}
    settings = {"num_inference_steps": SHORT, "seed": 1}
    body = json.dumps({"prompt": PROMPT, **settings})
    with Pipeline.load(bundle) as pipeline, server(bundle) as url:
        client = http.client.HTTPConnection(url.removeprefix("http://"), timeout=START_SECONDS)
        pixels = None
        for index in range(-3, repeats):
            before = time.perf_counter()
            (image,) = pipeline.draw(Request(prompt=PROMPT, **settings)).images
            drawn = time.perf_counter()
            image.save(BytesIO(), format="PNG")
            encoded = time.perf_counter()
            client.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
            answer = client.getresponse().read()
            answered = time.perf_counter()
            pixels = np.asarray(
                Image.open(BytesIO(base64.b64decode(json.loads(answer)["data"][0]["b64_json"])))
            )
            if index >= 0:
                for name, value in zip(
                    seconds, (drawn - before, encoded - before, answered - encoded), strict=True
                ):
                    seconds[name].append(value)
        assert np.array_equal(pixels, np.asarray(image)), "the server draws another picture"
    differences = [a - b for a, b in zip(seconds["server"], seconds["pipeline"], strict=True)]
    return {
        "steps": SHORT,
        **{name: quantiles(values, "ms", 1e3) for name, values in seconds.items()},
        "server minus pipeline": quantiles(differences, "ms", 1e3),
    }


def flood(bundle: Path, clients: int = 200, queue: int = 8) -> dict[str, Any]:
    """Clients that all ask at once, and do not come back."""

    async def ask(url: str) -> list[tuple[int, float]]:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=START_SECONDS) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(clients)))

    async def one(client: httpx.AsyncClient, seed: int) -> tuple[int, float]:
        before = time.perf_counter()
        body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": SHORT}
        answer = await client.post("/v1/images/generations", json=body)
        assert answer.status_code == 200 or "retry-after" in answer.headers
        return answer.status_code, time.perf_counter() - before

    with server(bundle, "--max-queue", str(queue)) as url:
        alone = asyncio.run(_alone(url, SHORT))
        answers = asyncio.run(ask(url))
        counted = {**outcomes(url), **outcomes(url, "ditc_rejected_total", "reason")}
    accepted = [seconds for status, seconds in answers if status == 200]
    return {
        "clients": clients,
        "queue": queue,
        "statuses": dict(Counter(status for status, _ in answers)),
        "outcomes in /metrics, with four requests before": counted,
        "one request alone, ms": round(alone * 1e3, 1),
        "accepted": quantiles(accepted, "ms", 1e3),
        "p99 by queue x alone": round(float(np.quantile(accepted, 0.99)) / (queue * alone), 2),
    }


def mixed(bundle: Path, requests: int = 60, load: float = 0.8) -> dict[str, Any]:
    """The same arrivals, half of them short, against both orders."""
    with server(bundle) as url:
        mean = asyncio.run(_alone(url, SHORT)) / 2 + asyncio.run(_alone(url, LONG)) / 2
    arrivals, now, dice = [], 0.0, random.Random(0)
    for _ in range(requests):
        now += dice.expovariate(load / mean)
        arrivals.append((now, dice.choice((SHORT, LONG))))
    rows: dict[str, Any] = {"requests": requests, "load": load}
    for name, before in (("first come, first served", FIRST_COME), ("by due time", "")):
        with server(bundle, before=before) as url:
            rows[name] = asyncio.run(_replay(url, arrivals))
    fcfs, due = rows["first come, first served"], rows["by due time"]
    rows["short requests, times faster (median)"] = round(fcfs["short"]["p50 ms"] / due["short"]["p50 ms"], 2)
    rows["throughput, ratio"] = round(fcfs["seconds"] / due["seconds"], 3)
    return rows


def batches(bundle: Path, clients: int = 8, each: int = 6, repeats: int = 2) -> dict[str, Any]:
    """Clients that ask again as soon as they are answered."""

    async def busy(url: str) -> float:
        async def client(number: int) -> None:
            async with httpx.AsyncClient(base_url=url, timeout=START_SECONDS) as session:
                for index in range(each):
                    body = {"prompt": PROMPT, "seed": 100 * number + index, "num_inference_steps": 20}
                    (await session.post("/v1/images/generations", json=body)).raise_for_status()

        before = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(clients)))
        return clients * each / (time.perf_counter() - before)

    rows: dict[str, list[float]] = {"one at a time": [], "with batches": []}
    sizes = {}
    for _ in range(repeats):  # in turns, so that other load slows both
        for name, flags in (("one at a time", ("--max-batch", "1")), ("with batches", ())):
            with server(bundle, *flags) as url:
                rows[name].append(asyncio.run(busy(url)))
                sizes[name] = [line for line in metrics(url) if line.startswith("ditc_best_batch_size{")]
    ratio = statistics.median(rows["with batches"]) / statistics.median(rows["one at a time"])
    return {
        "clients": clients,
        "pictures per second": {name: [round(v, 3) for v in values] for name, values in rows.items()},
        "batches that pay": sizes,
        "ratio": round(ratio, 3),
    }


async def _alone(url: str, steps: int) -> float:
    """The median time of a request when nothing else is asked."""
    seconds = []
    async with httpx.AsyncClient(base_url=url, timeout=START_SECONDS) as client:
        for seed in range(4):
            before = time.perf_counter()
            body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": steps}
            (await client.post("/v1/images/generations", json=body)).raise_for_status()
            seconds.append(time.perf_counter() - before)
    return statistics.median(seconds[1:])


async def _replay(url: str, arrivals: Sequence[tuple[float, int]]) -> dict[str, Any]:
    latencies: dict[int, list[float]] = {SHORT: [], LONG: []}
    begin = time.perf_counter()

    async def one(client: httpx.AsyncClient, seed: int, at: float, steps: int) -> None:
        await asyncio.sleep(at - (time.perf_counter() - begin))
        before = time.perf_counter()
        body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": steps}
        (await client.post("/v1/images/generations", json=body)).raise_for_status()
        latencies[steps].append(time.perf_counter() - before)

    async with httpx.AsyncClient(base_url=url, timeout=10 * START_SECONDS) as client:
        waits: list[Awaitable[None]] = [one(client, i, at, steps) for i, (at, steps) in enumerate(arrivals)]
        await asyncio.gather(*waits)
    return {
        "seconds": round(time.perf_counter() - begin - arrivals[0][0], 2),
        "short": quantiles(latencies[SHORT], "ms", 1e3),
        "long": quantiles(latencies[LONG], "ms", 1e3),
    }


def quantiles(seconds: Sequence[float], unit: str, factor: float) -> dict[str, float]:
    """Median, 10th, 90th and 99th percentile."""
    points = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        f"{name} {unit}": round(float(np.quantile(seconds, at)) * factor, 2) for name, at in points.items()
    }


def metrics(url: str) -> list[str]:
    """The lines of /metrics."""
    return httpx.get(f"{url}/metrics").text.splitlines()


def outcomes(url: str, metric: str = "ditc_requests_total", label: str = "outcome") -> dict[str, float]:
    """What a counter of the server says, by one of its labels."""
    found: Counter[str] = Counter()
    for line in metrics(url):
        if line.startswith(f"{metric}{{"):
            labels, value = line.rsplit(" ", 1)
            found[labels.split(f'{label}="')[1].split('"')[0]] += float(value)  # type: ignore[assignment]
    return dict(found)


@contextmanager
def server(bundle: Path, *flags: str, before: str = "") -> Iterator[str]:
    """A server process; gives its URL when it is ready. The arguments are those of `server_process`."""
    with server_process(bundle, *flags, before=before) as (url, _):
        yield url


@contextmanager
def server_process(bundle: Path, *flags: str, before: str = "") -> Iterator[tuple[str, int]]:
    """The same, with the number of the process.

    Args:
        before: Python that its process runs first.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", str(bundle), "--port", str(port), *flags]
    code = f"import sys; {before}from ditc.runtime.cli import main; sys.exit(main({arguments!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=dict(os.environ))
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while time.monotonic() < end:
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        else:
            raise SystemExit(f"the server was not ready after {START_SECONDS:g} s")
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


if __name__ == "__main__":
    main()
