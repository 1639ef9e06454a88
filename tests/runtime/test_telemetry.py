"""Libraries that report their use are silent: no connection, and no file in the home folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ditc.runtime.telemetry import OFF, turn_off

# Draws a picture while another thread counts this process's sockets. The wheel of onnxruntime 1.32 makes the files at
# once and connects after some seconds, so the sockets are watched for a while.
WATCHED = """
import json, os, sys, threading, time
from ditc.runtime.cli import main

def sockets():
    found = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
        except OSError:
            pass
    return found

seen, end = [], threading.Event()

def watch():
    while not end.wait(0.02):
        seen.append(sockets())

thread = threading.Thread(target=watch)
thread.start()
assert main(["run", sys.argv[1], "red cat", "-o", sys.argv[2], "--steps", "2", "--threads", "1"]) == 0
time.sleep(3)
end.set()
thread.join()
print(json.dumps([len(seen), max(seen)]))
"""


def clean(home: Path) -> dict[str, str]:
    """The environment of a user who has set nothing, in an empty home folder."""
    kept = {name: value for name, value in os.environ.items() if name not in (*OFF, "XDG_CACHE_HOME")}
    return {**kept, "HOME": str(home)}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="sockets are counted in Linux's /proc")
def test_drawing_opens_no_connection_and_leaves_no_file_in_the_home_folder(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-c", WATCHED, str(tiny_bundle), str(tmp_path / "out.png")]
    done = subprocess.run(
        command, env=clean(home), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    samples, most = json.loads(done.stdout.splitlines()[-1])
    assert samples > 10 and most == 0
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize("package", ["runtime", "export", "parity", "calib"])
def test_every_package_turns_telemetry_off_before_it_imports_anything_else(
    package: str, tmp_path: Path
) -> None:
    code = f"import os, ditc.{package}, json; print(json.dumps(dict(os.environ)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert OFF.items() <= json.loads(done.stdout).items()


def test_what_the_user_has_set_stays() -> None:
    environment = {"ORT_DISABLE_TELEMETRY": "0"}
    turn_off(environment)
    assert environment == {**OFF, "ORT_DISABLE_TELEMETRY": "0"}
