"""`ditc serve --ray` while its processes are killed: is every accepted request answered once, with the right picture?

    python -m benchmarks.ray_chaos --bundle build/demo/bundle --seconds 900

Four clients ask for pictures of a few seeds, whose right pixels were drawn before, one after the other. Every 20 s a
random replica or, one time in three, the front is killed with SIGKILL. A client whose connection breaks, because the
front was killed, or who is told to come back (429, 503, or a 500 with Retry-After), sends the same request again, as a
real one does. The run has failed if an answer is wrong, or a request is not answered within `--patience`.

The result is written to benchmarks/results/ after every kill. The same command on the same day goes on with what is
left of the time, if bundle and options are the same, and adds to it. It needs the extras serve and ray.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import earlier, write
from ditc.runtime.bundle.manifest import load_manifest

NAME = "ray_chaos"
SEEDS = range(6)
PATIENCE_S = 120.0


def main() -> int:
    """Run what is left of the time. Returns 1 if a picture was lost or wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--patience", type=float, default=PATIENCE_S)
    arguments = parser.parse_args()
    asked = {name: value for name, value in vars(arguments).items() if name not in ("bundle", "seconds")}
    asked["bundle"] = load_manifest(arguments.bundle).digest
    before = earlier(NAME, asked)
    parts: list[dict[str, Any]] = before.get("parts", [])

    def note(right: dict[str, str], part: dict[str, Any]) -> None:
        if right != before.setdefault("right", right):
            raise SystemExit("the quiet run has drawn other pictures than the one before")
        results = {"asked": asked, "right": right, "parts": [*parts, part]}
        print(write(NAME, {**results, "summary": summary(results["parts"])}), file=sys.stderr)

    left = arguments.seconds - sum(part["seconds"] for part in parts)
    if left > arguments.every:
        part = run(arguments, left, random.Random(len(parts)), note)
        note(before["right"], part)
        parts.append(part)
    found = summary(parts)
    print(json.dumps(found, indent=1))
    return 0 if found["wrong"] == found["unanswered"] == found["failed_exits"] == 0 else 1


def run(
    arguments: argparse.Namespace,
    seconds: float,
    chance: random.Random,
    note: Callable[[dict[str, str], dict[str, Any]], None],
) -> dict[str, Any]:
    """Start a server, and kill its processes for so long. Returns what has happened."""
    with tempfile.NamedTemporaryFile() as log:
        command = [sys.executable, "-m", "ditc.runtime.cli", "serve", str(arguments.bundle), "--ray"]
        command += ["--threads", "1", "--min-replicas", str(arguments.replicas), "--port", "0"]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            part = Chaos(arguments, seconds, server, Path(log.name), note).run(chance)
        finally:
            sys.stderr.write(Path(log.name).read_text(encoding="utf-8", errors="replace"))
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
    return {**part, "exit_code": code}


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of the parts, and the largest of what cannot be added."""

    def total(name: str) -> Any:
        return sum(part[name] for part in parts)

    again: Counter[str] = Counter()
    for part in parts:
        again.update(part["sent_again"])
    back = [seconds for part in parts for seconds in part["seconds_until_whole_again"]]
    return {
        "seconds": round(total("seconds"), 1),
        "answered": total("answered"),
        "wrong": total("wrong"),
        "unanswered": total("unanswered"),
        "sent_again": dict(again),
        "kills_of_replicas": total("kills_of_replicas"),
        "kills_of_the_front": total("kills_of_the_front"),
        "largest_seconds_until_whole_again": max(back, default=None),
        "largest_p50_s": max((part["p50_s"] for part in parts), default=None),
        "largest_p99_s": max((part["p99_s"] for part in parts), default=None),
        "failed_exits": sum(part.get("exit_code", 0) != 0 for part in parts),
    }


class Chaos:
    """The clients, and who kills.

    Args:
        note: gets the right pictures' hashes and the counts after every kill.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        seconds: float,
        server: subprocess.Popen[bytes],
        log: Path,
        note: Callable[[dict[str, str], dict[str, Any]], None],
    ) -> None:
        self._asked, self._length, self._server, self._log = arguments, seconds, server, log
        self._note, self._url = note, ""
        self._right: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._seconds: list[float] = []
        self._lock = threading.Lock()
        self._end = 0.0

    def run(self, chance: random.Random) -> dict[str, Any]:
        """The counts of the run. `chance` chooses who is killed."""
        self._wait(lambda: len(self._replicas()) == self._asked.replicas and self._served())
        for seed in SEEDS:
            self._right[seed] = self._pixels(self._post(seed))
        right = {str(seed): pixels for seed, pixels in self._right.items()}
        began = time.monotonic()
        self._end = began + self._length
        clients = [threading.Thread(target=self._client, args=(n,)) for n in range(self._asked.clients)]
        for client in clients:
            client.start()
        back = list[float]()
        try:
            while time.monotonic() + self._asked.every < self._end:
                time.sleep(self._asked.every)
                back.append(self._kill(chance))
                self._note(right, self._counted(time.monotonic() - began, back))
        except BaseException:
            self._end = 0.0  # so that the clients end, too
            raise
        for client in clients:
            client.join()
        return self._counted(time.monotonic() - began, back)

    def _counted(self, passed: float, back: list[float]) -> dict[str, Any]:
        with self._lock:
            seconds = sorted(self._seconds) or [0.0]
            answered = len(self._seconds)
        return {
            "seconds": round(passed, 1),
            "answered": answered,
            "wrong": self._counts["wrong"],
            "unanswered": self._counts["unanswered"],
            "sent_again": {name: n for name, n in self._counts.items() if name.startswith("again")},
            "kills_of_replicas": self._counts["replica"],
            "kills_of_the_front": self._counts["front"],
            "seconds_until_whole_again": [round(one, 1) for one in back],
            "p50_s": round(seconds[len(seconds) // 2], 3),
            "p99_s": round(seconds[int(0.99 * len(seconds))], 3),
        }

    def _client(self, number: int) -> None:
        chance = random.Random(100 + number)
        while time.monotonic() < self._end:
            seed, began = chance.choice(SEEDS), time.monotonic()
            while True:
                if time.monotonic() - began > self._asked.patience:
                    self._count("unanswered")
                    break
                try:
                    right = self._pixels(self._post(seed)) == self._right[seed]
                except urllib.error.HTTPError as error:
                    if "retry-after" not in error.headers:
                        self._count("unanswered")
                        break
                    self._count(f"again after {error.code}")
                    time.sleep(min(2.0, float(error.headers["retry-after"])))
                except OSError:
                    self._count("again after a broken connection")
                    time.sleep(0.2)
                else:
                    self._count("right" if right else "wrong")
                    with self._lock:
                        self._seconds.append(time.monotonic() - began)
                    break

    def _kill(self, chance: random.Random) -> float:
        """Kill a process. Returns the seconds until all are there again."""
        before = self._replicas()
        if chance.random() < 1 / 3:
            self._count("front")
            os.kill(self._front(), signal.SIGKILL)
            began = time.monotonic()
            self._wait(self._ready)
        else:
            self._count("replica")
            victim = chance.choice(sorted(before))
            os.kill(victim, signal.SIGKILL)
            began = time.monotonic()
            self._wait(lambda: victim not in self._replicas() and len(self._replicas()) == len(before))
        return time.monotonic() - began

    def _post(self, seed: int) -> Any:
        body = {"prompt": "a red heart", "seed": seed, "num_inference_steps": self._asked.steps}
        request = urllib.request.Request(
            f"{self._url}/v1/images/generations",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=self._asked.patience) as answer:
            return json.load(answer)

    def _pixels(self, answer: Any) -> str:
        return hashlib.sha256(answer["data"][0]["b64_json"].encode()).hexdigest()

    def _served(self) -> bool:
        """Whether the server has said where it is."""
        told = self._log.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^serving .* at (http://127\.0\.0\.1:\d+)", told, re.M)
        self._url = found[1] if found else ""
        return bool(found)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _replicas(self) -> set[int]:
        """The processes of the replicas, as the server's log names them."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        ready = dict(re.findall(r"(replica-\w+) is ready: process (\d+)", text))
        lost = set(re.findall(r"(replica-\w+) is lost", text))
        return {int(pid) for name, pid in ready.items() if name not in lost}

    def _front(self) -> int:
        parent = self._server.pid
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split():
            if "ditc.runtime.cli" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8"):
                return int(pid)
        raise SystemExit("the server has no front that could be killed: it has ended, or is starting")

    def _wait(self, condition: Any) -> None:
        end = time.monotonic() + self._asked.patience
        while not condition():
            if time.monotonic() > end or self._server.poll() is not None:
                raise SystemExit(f"the server is not whole again:\n{self._log.read_text(encoding='utf-8')}")
            time.sleep(0.1)

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


if __name__ == "__main__":
    sys.exit(main())
