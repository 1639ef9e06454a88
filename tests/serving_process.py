"""A real `ditc serve` process on a free port of the loopback interface, for tests over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

START_SECONDS = 60.0


@dataclass
class ServerProcess:
    """A running server. `url` has no slash at its end."""

    process: subprocess.Popen[bytes]
    url: str
    _output: IO[bytes] = field(repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        """All that the process has written to stdout and stderr so far."""
        return Path(self._output.name).read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> tuple[int, Mapping[str, str], Any]:
        """Status, headers and body, which is parsed if it is JSON."""
        return self._send(urllib.request.Request(self.url + path))

    def post(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], Any]:
        """Send JSON."""
        sent = {"content-type": "application/json", **(headers or {})}
        data = json.dumps({} if body is None else body).encode()
        return self._send(urllib.request.Request(self.url + path, data, sent, method="POST"))

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Ask /readyz until it answers 200."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server has ended: {self.output}"
            if self._status("/readyz") == 200:
                return
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready after {seconds:g} s: {self.output}")

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Send a signal and wait for the end. Returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def _status(self, path: str) -> int:
        try:
            return self.get(path)[0]
        except OSError:
            return 0

    def _send(self, request: urllib.request.Request) -> tuple[int, Mapping[str, str], Any]:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, headers, body = answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                status, headers, body = error.code, dict(error.headers), error.read()
        headers = {name.lower(): value for name, value in headers.items()}
        is_json = headers.get("content-type", "").startswith("application/json")
        return status, headers, json.loads(body) if is_json else body


@contextmanager
def server_process(
    *arguments: str | Path, ready: bool = True, environment: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Start `ditc serve` with these arguments, wait until it is ready, and kill it after the block if it still runs.

    Args:
        arguments: bundles and options; the port and --threads 1 are added.
        ready: whether to wait for /readyz. Otherwise only until the port is open.
        environment: variables in addition to those of the test.
    """
    port = free_port()
    command = [sys.executable, "-m", "ditc.runtime.cli", "serve", *map(str, arguments)]
    if "--threads" not in command:
        command += ["--threads", "1"]
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        server = ServerProcess(process, f"http://127.0.0.1:{port}", output)  # type: ignore[arg-type]
        try:
            if ready:
                server.wait_until_ready()
            else:
                _wait_for_port(server)
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(30)


def free_port() -> int:
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(server: ServerProcess) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert server.process.poll() is None, f"the server has ended: {server.output}"
        if server._status("/livez"):
            return
        time.sleep(0.05)
    raise AssertionError(f"the server did not listen: {server.output}")
