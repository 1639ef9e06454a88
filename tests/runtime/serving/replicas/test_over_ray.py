"""`ditc serve --ray` with real processes: they are killed and stopped, and its clients notice as little as can be."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from ray_server import DRAW, LONG, SMALL, alive, picture, replicas, running, until
from serving_process import ServerProcess, server_process

from ditc.runtime.bundle.manifest import load_manifest, save_manifest

pytestmark = pytest.mark.scale
pytest.importorskip("ray", reason="needs the extra: pip install ditc[ray]")

OPTIONS = ("--ray", "--min-replicas", "2", "--hang-seconds", "4", "--max-queue", "8", "--preload", "first")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("served") / "tiny"))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ServerProcess]:
    with server_process(bundle, *OPTIONS, ready=False) as process:
        process.wait_until_ready(120)
        until(lambda: len(replicas(process)) == 2)
        yield process
        assert process.stop(seconds=60) == 0, process.output
        assert not any(alive(pid) for pid in replicas(process))


def front(server: ServerProcess) -> int:
    """The process that answers HTTP: the child of the command that runs ditc."""
    for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split():
        if "ditc.runtime.cli" in Path(f"/proc/{pid}/cmdline").read_text():
            return int(pid)
    raise AssertionError("there is no front")


def busy(server: ServerProcess) -> int:
    """The replica that computes most."""

    def ticks(pid: int) -> int:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    before = {pid: ticks(pid) for pid in replicas(server)}
    sleep(0.3)
    return max(before, key=lambda pid: ticks(pid) - before[pid])


def accepted(server: ServerProcess) -> float:
    found = re.search(r"^ditc_accepted_requests (\S+)", server.get("/metrics")[2].decode(), re.M)
    assert found
    return float(found[1])


def test_answers_errors_and_events_are_those_of_the_single_server(
    server: ServerProcess, bundle: Path
) -> None:
    with server_process(bundle) as single:
        for body in (
            SMALL,
            {**SMALL, "n": 2, "output_format": "webp"},
            {**SMALL, "size": "63x64"},
            {**SMALL, "prompt": 3},
            {**SMALL, "model": "other"},
            {**SMALL, "timeout": 0.0001},
        ):
            one, other = (strip(each.post(DRAW, body)) for each in (single, server))
            assert one == other
        streamed = {**SMALL, "num_inference_steps": 6, "stream": True, "partial_images": 2}
        kinds = [
            re.findall(r"^event: (.*)$", each.post(DRAW, streamed)[2].decode(), re.M)
            for each in (single, server)
        ]
        assert all("image_generation.progress" in found for found in kinds)
        # Progress is sent at most ten times a second, and a step of this bundle is faster.
        shown = [[kind for kind in found if not kind.endswith("progress")] for found in kinds]
        assert shown[0] == shown[1] and len(shown[0]) == 3


def strip(answer: tuple[int, Any, Any]) -> Any:
    """Status, the names of the headers, and the body without what differs from run to run."""
    status, headers, body = answer

    def same(value: Any) -> Any:
        if isinstance(value, dict):
            names = value.keys() - {"id", "created", "seconds", "request_id"}
            return {name: same(value[name]) for name in sorted(names)}
        if isinstance(value, list):
            return [same(one) for one in value]
        return re.sub(r"takes about [\d.]+ s", "takes about", value) if isinstance(value, str) else value

    return status, sorted(headers), same(body)


def test_more_requests_than_the_bound_are_refused_exactly(server: ServerProcess) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: server.post(DRAW, {**LONG, "seed": seed}), range(16)))
    statuses = sorted(answer[0] for answer in answers)
    assert statuses == [200] * 8 + [429] * 8
    refused = next(answer for answer in answers if answer[0] == 429)
    assert int(refused[1]["retry-after"]) >= 1 and refused[2]["error"]["code"] == "overloaded"
    until(lambda: accepted(server) == 0)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_replica_that_is_killed_or_stopped_loses_no_request(
    server: ServerProcess, fault: signal.Signals
) -> None:
    expected = picture(server.post(DRAW, LONG))
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.post, DRAW, LONG)
        until(lambda: running(server))
        victim = busy(server)
        os.kill(victim, fault)
        until(lambda: victim not in replicas(server) and len(replicas(server)) == 2)
        assert picture(answer.result()) == expected
    until(lambda: accepted(server) == 0 and not alive(victim))


def test_a_killed_front_is_back_with_the_same_replicas(server: ServerProcess) -> None:
    expected, before = picture(server.post(DRAW, SMALL)), replicas(server)
    with ThreadPoolExecutor() as pool:
        lost = pool.submit(server.post, DRAW, LONG)
        until(lambda: running(server))
        os.kill(front(server), signal.SIGKILL)
        assert picture(server.post(DRAW, SMALL)) == expected  # waits in the socket
        with pytest.raises(OSError):
            lost.result()
    assert replicas(server)[-2:] == before or set(replicas(server)) == set(before)
    until(lambda: accepted(server) == 0)


def test_a_rebuilt_bundle_replaces_the_old_one_under_load(server: ServerProcess, bundle: Path) -> None:
    manifest = load_manifest(bundle)
    body = {**SMALL, "num_inference_steps": None}
    pictures = {manifest.digest: picture(server.post(DRAW, body))}
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.post, DRAW, body) for _ in range(40)]
        steps = manifest.defaults.num_inference_steps + 1
        save_manifest(
            replace(manifest, defaults=replace(manifest.defaults, num_inference_steps=steps)), bundle
        )
        newest = load_manifest(bundle).digest
        server.process.send_signal(signal.SIGHUP)  # which the command passes on
        until(lambda: server.post(DRAW, body)[2]["ditc"]["bundle"] == newest)
        answers += [pool.submit(server.post, DRAW, body) for _ in range(10)]
        done = [answer.result() for answer in answers]
    pictures[newest] = picture(server.post(DRAW, body))
    assert pictures[newest] != pictures[manifest.digest]
    assert all(picture(answer) == pictures[answer[2]["ditc"]["bundle"]] for answer in done)
    assert done[-1][2]["ditc"]["bundle"] == newest
