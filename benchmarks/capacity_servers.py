"""Real servers for benchmarks/capacity.py: `ditc serve` processes with one thread each, on the loopback interface."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.capacity_simulation import MIX, Arrival, Times, described

OPTIONS = ("--port", "0", "--threads", "1", "--max-batch", "1", "--json")


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
