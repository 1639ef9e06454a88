"""A real server process with keys: what it refuses to start with, who gets in, and new keys without a restart."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from serving_process import ServerProcess, server_process

from ditc.runtime import cli

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"


def write_keys(path: Path, **keys: str) -> Path:
    path.write_text(json.dumps({"keys": [{"name": name, "key": key} for name, key in keys.items()]}))
    path.chmod(0o600)
    return path


def ask(server: ServerProcess, key: str) -> int:
    body = {"prompt": "a red cat", "num_inference_steps": 1, "size": "64x64"}
    status, _, _ = server.post("/v1/images/generations", body, {"authorization": f"Bearer {key}"})
    return status


def test_keys_are_asked_for_and_read_again_on_a_signal(tiny_bundle: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.json", alice=ALICE)
    with server_process(tiny_bundle, "--api-keys", keys, "--host", "0.0.0.0", "-v") as server:
        assert server.get("/metrics")[0] == 401
        assert (ask(server, ALICE), ask(server, BOB)) == (200, 401)
        write_keys(keys, bob=BOB)
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 20
        while ask(server, BOB) == 401:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert ask(server, ALICE) == 401
        keys.write_text("broken")
        server.process.send_signal(signal.SIGHUP)
        while "the keys stay as they were" not in server.output:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert ask(server, BOB) == 200
        assert server.stop() == 0
        assert "key=bob" in server.output
        assert "red cat" not in server.output and "0123456789" not in server.output


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_without_keys_another_address_than_loopback_is_refused(
    tiny_bundle: Path, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", str(tiny_bundle), "--host", host]) == 2
    assert "hint: give a file of keys with --api-keys" in capsys.readouterr().err


def test_a_file_without_keys_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text('{"keys": "' + ALICE + '"}')
    assert cli.main(["serve", str(tiny_bundle), "--api-keys", str(keys)]) == 2
    said = capsys.readouterr().err
    assert "expected a list" in said and ALICE not in said
