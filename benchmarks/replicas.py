"""What do replicas of `ditc serve --ray` gain, and what do they cost? The single server, one replica, and two.

    python -m benchmarks.replicas --bundle build/demo/bundle

Every round starts the three servers one after the other, all with one thread per process and one picture at a time:

    throughput   pictures per second of `--clients` clients that never pause, for `--seconds`
    latency      seconds of one request of one step at a time, `--requests` of them

Compared are the rounds' medians: two replicas beside one, and the p50 of one replica beside the single server's. The
result is written after every server; the same command on the same day goes on with the rounds that are missing, if
bundle and options are the same. It needs the extras serve and ray, and as many idle cores as there are replicas.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import earlier, spread, write
from ditc.runtime.bundle.manifest import load_manifest

NAME = "replicas"
# Name, options, number of replicas that must be there.
SERVERS: dict[str, tuple[tuple[str, ...], int]] = {
    "single": ((), 0),
    "one": (("--ray", "--min-replicas", "1"), 1),
    "two": (("--ray", "--min-replicas", "2"), 2),
}
OPTIONS = ("--threads", "1", "--max-batch", "1")
START_SECONDS = 180.0
# Requests before the measured ones, per replica.
WARM_UP = 4


def main() -> None:
    """Run the rounds that are missing, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("build/demo/bundle"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40.0, help="Length of a measurement of throughput.")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200, help="Requests of a measurement of latency.")
    arguments = parser.parse_args()
    asked = {name: value for name, value in vars(arguments).items() if name not in ("bundle", "rounds")}
    asked["bundle"] = load_manifest(arguments.bundle).digest
    measured = earlier(NAME, asked).get("measured", [])
    for number in range(arguments.rounds):
        for name in SERVERS:
            if not any((one["round"], one["server"]) == (number, name) for one in measured):
                one = {"round": number, "server": name, **measure(name, arguments)}
                measured.append(one)
                print(json.dumps(one), file=sys.stderr)
                path = write(NAME, {"asked": asked, "measured": measured, "summary": summary(measured)})
                print(path, file=sys.stderr)
    print(json.dumps(summary(measured), indent=1))


def summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of the rounds, and what the comparison says.

    Returns:
        per server pictures per second and p50 of latency in milliseconds; `gain`, of two replicas over one; and
        `overhead_ms`, of one replica over the single server. What is not measured yet is left out.
    """
    found: dict[str, Any] = {}
    for name in SERVERS:
        mine = [one for one in measured if one["server"] == name]
        if mine:
            found[name] = {
                "pictures_per_s": round(statistics.median(one["pictures_per_s"] for one in mine), 3),
                "p50_ms": round(statistics.median(one["latency_ms"]["median"] for one in mine), 2),
                "rounds": len(mine),
            }
    if "one" in found and "two" in found:
        found["gain"] = round(found["two"]["pictures_per_s"] / found["one"]["pictures_per_s"], 3)
    if "one" in found and "single" in found:
        found["overhead_ms"] = round(found["one"]["p50_ms"] - found["single"]["p50_ms"], 2)
    return found


def measure(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Start one server, and measure it."""
    options, replicas = SERVERS[name]
    with serving(asked.bundle, options, replicas) as port:
        for seed in range(WARM_UP * max(1, replicas)):
            draw(port, steps=asked.steps, seed=seed)
        load = os.getloadavg()[0]
        done = throughput(port, asked)
        seconds = [draw(port, steps=1, seed=seed) for seed in range(asked.requests)]
    return {
        "load_before": round(load, 2),
        "pictures_per_s": round(done / asked.seconds, 3),
        "latency_ms": {
            name: round(1000 * s, 2) if name != "repeats" else s for name, s in spread(seconds).items()
        },
    }


def throughput(port: int, asked: argparse.Namespace) -> int:
    """How many pictures clients that never pause get in the time. Those in work at its end do not count."""
    end, counts = time.monotonic() + asked.seconds, [0] * asked.clients

    def client(number: int) -> None:
        seed = 1000 * (number + 1)
        while True:
            draw(port, steps=asked.steps, seed=seed)
            if time.monotonic() > end:
                return
            counts[number] += 1
            seed += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(asked.clients)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return sum(counts)


def draw(port: int, *, steps: int, seed: int) -> float:
    """Draw one picture. Returns the seconds that it took."""
    body = {"prompt": "a red heart, flat style", "seed": seed, "num_inference_steps": steps}
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request(
            "POST", "/v1/images/generations", json.dumps(body), {"content-type": "application/json"}
        )
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise SystemExit(f"the server has answered {answer.status}: {content[:300]!r}")
    return time.perf_counter() - began


@contextmanager
def serving(bundle: Path, options: tuple[str, ...], replicas: int) -> Iterator[int]:
    """A server that is ready, with all its replicas. Yields its port, and stops it."""
    with tempfile.NamedTemporaryFile("w+b") as log:
        command = [sys.executable, "-m", "ditc.runtime.cli", "serve", str(bundle)]
        server = subprocess.Popen(
            [*command, *OPTIONS, *options, "--port", "0"], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                told = Path(log.name).read_text(encoding="utf-8", errors="replace")
                port = re.search(r"^serving .* at http://127\.0\.0\.1:(\d+)", told, re.M)
                if port and len(re.findall(r"replica-\w+ is ready", told)) == replicas:
                    break
                if server.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server is not ready:\n{told}")
                time.sleep(0.1)
            yield int(port[1])
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


if __name__ == "__main__":
    main()
