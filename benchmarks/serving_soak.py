"""Does a server stay well under everything that clients and faults do to it?

    python -m benchmarks.serving_soak [--bundle build/demo/bundle] [--seconds 1800] [--disconnects 1000]

First so many clients go away at random moments of their requests. Then, for so many seconds, clients of every kind ask
at random: plain and streamed pictures, jobs that are polled, fetched, cancelled or forgotten, wrong requests, and
clients that go away. All the while, one run of the denoiser in 200 fails, so that the bundle is opened again, and one
in 100 gives NaN. Checked is that

- every request that was accepted ended exactly once, with an answer or because its client had gone,
- the picture of a quiet moment afterwards is that of the pipeline,
- memory and open files do not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import sys
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
from PIL import Image

from benchmarks.machine import write
from benchmarks.serving import outcomes, server_process
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request

PROMPT = "a red heart, flat style"
TIMEOUT = 300.0
# In the first minutes, the allocator's pools and the text cache still grow with every kind of request.
STEADY_SECONDS, MOST_GROWTH = 600.0, 0.05
# Answers that a client may get without a fault of the server: full queue, shutting down, planted faults, deadlines.
EXPECTED = {200, 400, 404, 409, 429, 500, 503, 504}
# Run by the server's process before the command: some steps for clients fail, and some give NaN.
PLANTED = """
import random, threading
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.spec import DENOISER
dice = random.Random(0)
def happens(chance):
    return threading.current_thread().name == "ditc-steps" and dice.random() < chance
class Faulty:
    def __init__(self, inner):
        self.inner, self.spec, self.device = inner, inner.spec, inner.device
    def run(self, feeds):
        if happens(CRASHES):
            raise RuntimeError("planted")
        outputs = self.inner.run(feeds)
        if happens(NANS):
            outputs["stats"] = outputs["stats"] + 1
        return outputs
    def close(self):
        self.inner.close()
load = Pipeline.load.__func__
def planted(cls, *given, **named):
    pipeline = load(cls, *given, **named)
    pipeline.sessions[DENOISER] = Faulty(pipeline.sessions[DENOISER])
    return pipeline
Pipeline.load = classmethod(planted)
"""


def main() -> None:
    """Run both parts, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("build/demo/bundle"))
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--disconnects", type=int, default=1000)
    arguments = parser.parse_args()
    result = soak(arguments.bundle, seconds=arguments.seconds, disconnects=arguments.disconnects)
    print(write("serving_soak", result))
    sys.exit(bool(result["problems"]))


def soak(bundle: Path, *, seconds: float, disconnects: int, seed: int = 0) -> dict[str, Any]:
    """Both parts against one server.

    Returns:
        What happened, with a list of problems, which should be empty.
    """
    planted = PLANTED.replace("CRASHES", "0.005").replace("NANS", "0.01")
    with server_process(bundle, before=f"exec({planted!r}); ") as (url, pid):
        clients = Clients(url, pid, random.Random(seed))
        asyncio.run(clients.run(disconnects, seconds))
        problems = clients.problems + _wrong_picture(bundle, url)
        left = outcomes(url)
        samples = clients.samples
    growth = _growth(samples)
    if seconds >= STEADY_SECONDS and growth > MOST_GROWTH:
        problems.append(f"memory grew by {growth:.1%} over the second half")
    if samples and samples[-1][2] > samples[0][2] + 16:
        problems.append(f"open files grew from {samples[0][2]} to {samples[-1][2]}")
    return {
        "seconds": seconds,
        "disconnects": disconnects,
        "asked": dict(clients.asked),
        "answers": {str(status): count for status, count in sorted(clients.answers.items())},
        "outcomes in /metrics": left,
        "rss MB": [round(sample[1] / 1e6, 1) for sample in samples[:: max(1, len(samples) // 12)]],
        "open files": [sample[2] for sample in samples[:: max(1, len(samples) // 12)]],
        "growth of memory in the second half": round(growth, 4),
        "problems": problems,
    }


class Clients:
    """Random clients of one server, and what they saw."""

    def __init__(self, url: str, pid: int, dice: random.Random) -> None:
        self.problems: list[str] = []
        self.asked: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        self.samples: list[tuple[float, int, int]] = []  # seconds, resident bytes, open files
        self._url, self._pid, self._dice = url, pid, dice

    async def run(self, disconnects: int, seconds: float) -> None:
        """First clients that go away, then clients of every kind."""
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=8)
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT, limits=limits) as client:
            watch = asyncio.create_task(self._sample())
            for _ in range(0, disconnects, 10):
                await asyncio.gather(*(self._goes_away(client) for _ in range(10)))
            end = time.monotonic() + seconds
            await asyncio.gather(*(self._ask_until(client, end) for _ in range(6)))
            await self._wait_until_idle(client)
            watch.cancel()

    async def _ask_until(self, client: httpx.AsyncClient, end: float) -> None:
        kinds = (self._plain, self._streams, self._job, self._goes_away, self._is_wrong)
        while time.monotonic() < end:
            await self._dice.choices(kinds, (4, 2, 2, 3, 1))[0](client)

    def _body(self, **more: Any) -> dict[str, Any]:
        steps = self._dice.choice((1, 2, 4, 8, 20))
        body = {"prompt": PROMPT, "seed": self._dice.randrange(99), "num_inference_steps": steps}
        return body | {"n": self._dice.choice((1, 1, 1, 2, 3))} | more

    async def _plain(self, client: httpx.AsyncClient) -> None:
        body = self._body()
        answer = await client.post("/v1/images/generations", json=body)
        self._note("plain", answer)
        if answer.status_code == 200:
            pictures, failures = answer.json()["data"], answer.json()["ditc"]["failures"]
            if len(pictures) + len(failures) != body["n"]:  # NaN was planted into those that failed
                self.problems.append(
                    f"{len(pictures)} pictures and {len(failures)} failures for n = {body['n']}"
                )

    async def _streams(self, client: httpx.AsyncClient) -> None:
        body, ends = self._body(stream=True, partial_images=2, n=1), 0
        async with client.stream("POST", "/v1/images/generations", json=body) as answer:
            if answer.status_code == 200:
                async for line in answer.aiter_lines():
                    ends += line.startswith(("event: image_generation.completed", "event: error"))
                if ends != 1:
                    self.problems.append(f"a stream had {ends} ends")
            self._note("stream", answer)

    async def _job(self, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/images/jobs", json=self._body())
        self._note("job", answer)
        if answer.status_code != 200 or self._dice.random() < 0.1:  # forgotten
            return
        path = f"/v1/images/jobs/{answer.json()['id']}"
        if self._dice.random() < 0.3:
            await asyncio.sleep(self._dice.random())
            self._note("job cancelled", await client.delete(path))
            return
        while (await client.get(path)).json().get("status") in ("queued", "in_progress"):
            await asyncio.sleep(0.05)
        self._note("job content", await client.get(f"{path}/content"))

    async def _goes_away(self, client: httpx.AsyncClient) -> None:
        self.asked["disconnect"] += 1
        body = self._body(stream=True, n=1) if self._dice.random() < 0.5 else self._body()
        ask = asyncio.create_task(client.post("/v1/images/generations", json=body))
        await asyncio.wait([ask], timeout=self._dice.random() * 0.5)
        ask.cancel()  # closes the connection
        await asyncio.gather(ask, return_exceptions=True)

    async def _is_wrong(self, client: httpx.AsyncClient) -> None:
        wrong = self._dice.choice(
            ({"prompt": 3}, {"prompt": PROMPT, "n": 11}, {"prompt": PROMPT, "x": 1}, [])
        )
        answer = await client.post("/v1/images/generations", json=wrong)
        self._note("wrong", answer)
        if answer.status_code != 400:
            self.problems.append(f"{wrong} was answered with {answer.status_code}")

    def _note(self, kind: str, answer: httpx.Response) -> None:
        self.asked[kind] += 1
        self.answers[answer.status_code] += 1
        if answer.status_code not in EXPECTED:
            self.problems.append(f"{kind}: status {answer.status_code}")

    async def _wait_until_idle(self, client: httpx.AsyncClient) -> None:
        for _ in range(600):
            text = (await client.get("/metrics")).text
            if all(
                float(line.split()[-1]) == 0
                for line in text.splitlines()
                if line.startswith("ditc_queue_depth")
            ):
                return
            await asyncio.sleep(0.1)
        self.problems.append("requests are left in the queue after all clients have gone")

    async def _sample(self) -> None:
        begin = time.monotonic()
        while True:
            status = Path(f"/proc/{self._pid}/status").read_text(encoding="utf-8")
            resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
            files = len(os.listdir(f"/proc/{self._pid}/fd"))  # noqa: PTH208  # counts links
            self.samples.append((time.monotonic() - begin, resident * 1024, files))
            await asyncio.sleep(1)


def _growth(samples: list[tuple[float, int, int]]) -> float:
    """How much a straight line through the memory of the second half rises over it, relative to its mean."""
    half = samples[len(samples) // 2 :]
    if len(half) < 30:
        return 0.0
    at, resident = np.array([(sample[0], sample[1]) for sample in half], np.float64).T
    return float(np.polyfit(at, resident, 1)[0] * (at[-1] - at[0]) / resident.mean())


def _wrong_picture(bundle: Path, url: str) -> list[str]:
    """Ask until an answer is not a planted fault, and compare its picture with the pipeline's."""
    settings = {"num_inference_steps": 2, "seed": 5}
    for _ in range(20):
        answer = httpx.post(
            f"{url}/v1/images/generations", json={"prompt": PROMPT, **settings}, timeout=TIMEOUT
        )
        if answer.status_code == 200:
            break
        time.sleep(1)
    else:
        return [f"no picture afterwards: {answer.text}"]
    picture = np.asarray(
        Image.open(BytesIO(base64.b64decode(json.loads(answer.text)["data"][0]["b64_json"])))
    )
    with Pipeline.load(bundle) as pipeline:
        (image,) = pipeline.draw(Request(prompt=PROMPT, **settings)).images
    return [] if np.array_equal(picture, np.asarray(image)) else ["the picture afterwards is another one"]


if __name__ == "__main__":
    main()
