"""`ditc serve` as a process: it starts, becomes ready, and ends on a signal."""

from __future__ import annotations

from pathlib import Path

from serving_process import server_process


def test_the_server_becomes_ready_and_ends_on_a_signal(tiny_bundle: Path) -> None:
    with server_process(tiny_bundle) as server:
        assert server.get("/livez")[0] == 200
        assert server.get("/readyz")[0] == 200
        assert server.stop() == 0, server.output
        assert server.url in server.output
