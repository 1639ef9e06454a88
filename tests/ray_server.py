"""What tests of `ditc serve --ray` ask of its processes."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from serving_process import ServerProcess, free_port

DRAW = "/v1/images/generations"
SMALL = {"prompt": "red cat", "seed": 3, "size": "64x64", "num_inference_steps": 2}
# Some seconds of work: long enough to be in the middle of it.
LONG = {**SMALL, "num_inference_steps": 100}


def until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end
        sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def replicas(server: ServerProcess) -> list[int]:
    """The processes of the replicas that have not been lost, in the order of their starts."""
    ready = re.findall(r"(replica-\w+) is ready: process (\d+)", server.output)
    lost = set(re.findall(r"(replica-\w+) is lost", server.output))
    return [int(pid) for name, pid in dict(ready).items() if name not in lost]


def picture(answer: tuple[int, Any, Any]) -> str:
    assert answer[0] == 200, answer
    found: str = answer[2]["data"][0]["b64_json"]
    return found


def running(server: ServerProcess) -> bool:
    return (
        re.search(r'^ditc_running\{model="tiny"\} [1-9]', server.get("/metrics")[2].decode(), re.M)
        is not None
    )


class Nodes:
    """A cluster of Ray on this machine, whose nodes are `ray start` commands. It asks for a token.

    Args:
        folder: for the files of Ray; the paths of its sockets must be short.
    """

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        self.started: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def command(self, *, cpus: int = 1) -> list[str]:
        """What starts a node, and ends with it. The first one is the head."""
        role = ["--address", self.address]
        if not self.started:
            role = [
                "--head",
                "--port",
                str(self.port),
                "--include-dashboard=false",
                "--temp-dir",
                str(self.folder),
            ]
        return [
            *(
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                "--block",
                "--disable-usage-stats",
                *role,
            ),
            *(
                "--node-ip-address",
                "127.0.0.1",
                "--num-cpus",
                str(cpus),
                "--object-store-memory",
                "100000000",
            ),
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *("--dashboard-agent-listen-port", "0", "--metrics-export-port", "0"),
        ]

    def start(
        self,
        command: Sequence[str] | None = None,
        *,
        before: Sequence[str] = (),
        cache: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a node.

        Args:
            command: None for the usual one.
            before: words in front of the command.
            cache: the node's folder for caches.
        """
        variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        variables |= {**self.token, **(environment or {})}
        if cache is not None:
            variables["XDG_CACHE_HOME"] = str(cache)
        if self.started:
            until(lambda: answers(self.port))
        words = [*before, *(self.command() if command is None else command)]
        with (self.folder / f"node-{len(self.started)}.txt").open("wb") as output:
            node = subprocess.Popen(words, env=variables, stdout=output, stderr=subprocess.STDOUT)
        self.started.append(node)
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Kill all processes of a node, as a machine that loses its power."""
        for pid in [node.pid, *below(node.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait(30)


@contextmanager
def ray_nodes() -> Iterator[Nodes]:
    """A cluster without nodes yet. They are killed after the block."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    cluster = Nodes(folder)
    try:
        yield cluster
    finally:
        for node in reversed(cluster.started):
            if node.poll() is None:
                cluster.kill(node)
        shutil.rmtree(folder, ignore_errors=True)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def below(pid: int) -> list[int]:
    """All processes that a process has started, and those that they have started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, new = list[int](), [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found
