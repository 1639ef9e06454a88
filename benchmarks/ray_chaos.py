"""`ditc serve --ray` while its processes are killed: is every accepted request answered once, with the right picture?

    python -m benchmarks.ray_chaos --bundle build/demo/bundle --seconds 900

Four clients ask for pictures of a few seeds, whose right pixels were drawn before, one after the other. Every 20 s a
random replica or, one time in three, the front is killed with SIGKILL. A client whose connection breaks, because the
front was killed, or who is told to come back (429, 503, or a 500 with Retry-After), sends the same request again, as a
real one does. The run has failed if an answer is wrong, or a request is not answered within `--patience`.

It needs the extras serve and ray. The result is written as JSON.
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
from pathlib import Path
from typing import Any

SEEDS = range(6)


def main() -> int:
    """Run it. Returns 1 if a picture was lost or wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--patience", type=float, default=120.0)
    parser.add_argument("--port", type=int, default=8137)
    parser.add_argument("-o", "--output", type=Path, default=Path("ray_chaos.json"))
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile() as log:
        command = [sys.executable, "-m", "ditc.runtime.cli", "serve", str(arguments.bundle), "--ray"]
        command += [
            "--threads",
            "1",
            "--min-replicas",
            str(arguments.replicas),
            "--port",
            str(arguments.port),
        ]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            result = Chaos(arguments, server, Path(log.name)).run()
        finally:
            sys.stderr.write(Path(log.name).read_text(encoding="utf-8", errors="replace"))
            server.send_signal(signal.SIGTERM)
            result_code = server.wait(60)
    result["exit_code"] = result_code
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0 if result["wrong"] == result["unanswered"] == result_code == 0 else 1


class Chaos:
    """The clients, and who kills."""

    def __init__(self, arguments: argparse.Namespace, server: subprocess.Popen[bytes], log: Path) -> None:
        self._asked, self._server, self._log = arguments, server, log
        self._url = f"http://127.0.0.1:{arguments.port}"
        self._right: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._seconds: list[float] = []
        self._lock = threading.Lock()
        self._end = 0.0

    def run(self) -> dict[str, Any]:
        """The counts of the run."""
        self._wait(lambda: len(self._replicas()) == self._asked.replicas and self._ready())
        for seed in SEEDS:
            self._right[seed] = self._pixels(self._post(seed))
        self._end = time.monotonic() + self._asked.seconds
        clients = [threading.Thread(target=self._client, args=(n,)) for n in range(self._asked.clients)]
        for client in clients:
            client.start()
        chance, back = random.Random(0), []
        while time.monotonic() + self._asked.every < self._end:
            time.sleep(self._asked.every)
            back.append(self._kill(chance))
        for client in clients:
            client.join()
        seconds = sorted(self._seconds)
        return {
            "seconds": self._asked.seconds,
            "clients": self._asked.clients,
            "answered": len(seconds),
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
