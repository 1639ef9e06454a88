"""`ditc serve` as a process: it becomes ready, replaces bundles, ends in order, and leaves nothing behind."""

from __future__ import annotations

import shutil
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving_process import ServerProcess, free_port, server_process

from ditc.runtime.bundle.manifest import load_manifest, save_manifest
from ditc.runtime.cli import USAGE, main
from ditc.runtime.commands.serve import _Opening
from ditc.runtime.commands.serve_arguments import default_name

DRAW = "/v1/images/generations"
QUICK = {"prompt": "red cat", "size": "64x64", "num_inference_steps": 2, "seed": 3}
# Some seconds of work in many steps, and far more than a test may take.
LONG = {**QUICK, "num_inference_steps": 100, "n": 2}
ENDLESS = {**LONG, "n": 10}
OPTIONS = ("--warm-up-seconds", "0")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(server: ServerProcess) -> bool:
    return b'ditc_running{model="tiny"} 1.0' in server.get("/metrics")[2]


def version(server: ServerProcess) -> str:
    return str(server.get("/v1/models/tiny")[2]["ditc"]["bundle"])


def test_a_server_replaces_its_bundle_and_ends_without_losing_a_request(bundle: Path) -> None:
    with server_process(bundle, *OPTIONS, ready=False) as server, ThreadPoolExecutor() as pool:
        assert server.get("/livez")[0] == 200
        status, headers, answer = server.get("/readyz")
        assert (status, headers["retry-after"]) == (503, "1"), answer
        assert answer["models"] == {"tiny": {"state": "loading", "reason": "it is being opened"}}
        server.wait_until_ready()
        until(lambda: f"serving tiny at {server.url}\n" in server.output)

        long = pool.submit(server.post, DRAW, LONG)
        until(lambda: running(server))
        manifest = load_manifest(bundle)
        save_manifest(replace(manifest, defaults=replace(manifest.defaults, guidance_scale=2.5)), bundle)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: version(server) == load_manifest(bundle).digest != manifest.digest)
        assert server.post(DRAW, QUICK)[0] == 200
        answer = long.result()[2]
        assert len(answer["data"]) == 2 and answer["ditc"]["bundle"] == manifest.digest

        last = pool.submit(server.post, DRAW, LONG)
        until(lambda: running(server))
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/readyz")[0] == 503)
        assert server.get("/readyz")[2]["status"] == "shutting_down" and server.get("/livez")[0] == 200
        status, headers, answer = server.post(DRAW, QUICK)
        assert (status, headers["retry-after"]) == (503, "5") and answer["error"]["code"] == "unavailable"
        assert last.result()[0] == 200
        assert server.process.wait(30) == 0 and "Traceback" not in server.output


def test_what_is_not_done_in_time_is_ended_and_a_second_signal_ends_at_once(tiny_bundle: Path) -> None:
    named, quick = f"--name=tiny={tiny_bundle}", ("--drain-seconds", "1")
    with server_process(named, *OPTIONS, *quick) as server, ThreadPoolExecutor() as pool:
        long = pool.submit(server.post, DRAW, ENDLESS)
        until(lambda: running(server))
        assert server.stop(seconds=20.0) == 0
        status, headers, answer = long.result()
        assert status == 503 and headers["retry-after"] and answer["error"]["type"] == "server_error"
    with server_process(named, *OPTIONS) as server, ThreadPoolExecutor() as pool:
        long = pool.submit(server.post, DRAW, ENDLESS)
        until(lambda: running(server))
        server.process.send_signal(signal.SIGINT)
        until(lambda: server.get("/readyz")[0] == 503)
        assert server.stop(signal.SIGINT) == 128 + signal.SIGINT
        with pytest.raises(OSError):
            long.result()


def test_a_killed_server_leaves_nothing_that_keeps_the_next_one_from_serving(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    place = tmp_path / "temporary"
    (place / "ditc-copy-of-a-killed-server").mkdir(parents=True)
    before = sorted(path for path in tiny_bundle.rglob("*"))
    for _ in range(2):
        environment = {"TMPDIR": str(place)}
        with server_process(tiny_bundle, *OPTIONS, "--private-copy", environment=environment) as server:
            assert server.post(DRAW, QUICK)[0] == 200
            server.process.kill()
            server.process.wait(30)
        assert not list(place.iterdir()) and sorted(path for path in tiny_bundle.rglob("*")) == before
    private = (tiny_bundle, *OPTIONS, "--private-copy")
    with server_process(*private, ready=False, environment={"TMPDIR": str(place)}) as server:
        assert server.stop() == 0 and not list(place.iterdir())  # while it copies, or loads


def errors_of(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["serve", *map(str, arguments)]) == USAGE
    return capsys.readouterr().err


def test_what_is_wrong_is_said_before_anything_is_loaded(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"--name=a={tiny_bundle}"
    assert "two bundles are named a" in errors_of(capsys, named, named)
    assert "'a b' cannot be the name of a model" in errors_of(capsys, f"--name=a b={tiny_bundle}")
    assert "no bundle is given" in errors_of(capsys)
    assert "names no bundle" in errors_of(capsys, "--name=a")
    assert str(tmp_path / "nothing") in errors_of(capsys, tmp_path / "nothing")
    assert "'12 apples' is not a number of bytes" in errors_of(capsys, named, "--memory-budget=12 apples")
    assert "the memory budget is 0.00 GB" in errors_of(capsys, named, "--memory-budget=1K")
    assert "the bound of requests is 0" in errors_of(capsys, named, "--max-queue=0")
    assert "port 70000 does not exist" in errors_of(capsys, named, "--port=70000")
    assert "without keys, every machine" in errors_of(capsys, named, "--host=0.0.0.0")
    assert "is not certified" in errors_of(capsys, named, "--require-certificate", "--port=0")
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port()))
        other.listen()
        error = errors_of(capsys, named, f"--port={other.getsockname()[1]}")
    assert "cannot listen on 127.0.0.1" in error and "hint: choose another --port" in error


def test_a_bundle_is_named_after_its_folder() -> None:
    for path, name in (
        ("build/demo/bundle", "demo"),
        ("/tmp/sana-sprint/", "sana-sprint"),
        ("org/model@v1", "model"),
        ("/build/bundle", "bundle"),
    ):
        assert default_name(Path(path)) == name


def test_replicas_need_an_extra_and_possible_numbers(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    error = errors_of(capsys, tiny_bundle, "--ray", "--port=0")
    assert "ray is not installed" in error and 'hint: pip install "ditc[ray]"' in error
    impossible = ("--ray", "--min-replicas=3", "--max-replicas=2")
    assert "3 to 2 replicas are not possible" in errors_of(capsys, tiny_bundle, *impossible)
    assert "-1 GPUs per replica" in errors_of(capsys, tiny_bundle, "--ray", "--gpus-per-replica=-1")


def test_the_address_of_the_page_is_printed_with_ui_alone(capsys: pytest.CaptureFixture[str]) -> None:
    models: Any = SimpleNamespace(awaited=(), names=("tiny",))
    server: Any = None
    for ui in (False, True):
        _Opening(models, server, Namespace(json=False, ui=ui), "http://127.0.0.1:1").run()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["serving tiny at http://127.0.0.1:1"] * 2 + [
        "the page for browsers is http://127.0.0.1:1/ui/"
    ]
