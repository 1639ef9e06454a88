"""A scheduler over the bundle of the tests, and a listener that keeps what it hears."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from serving_process import ServerProcess, server_process
from serving_scheduler import Serve, Server

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.scheduling.scheduler import Scheduler, SchedulerOptions


@pytest.fixture
def serve(tiny_bundle: Path) -> Iterator[Serve]:
    """Makes servers over pipelines that are opened by `reopen`; they are closed after the test."""
    made: list[Server] = []

    def make(
        *,
        reopen: Callable[[], Pipeline] | None = None,
        bounds: Bounds | None = None,
        start: bool = True,
        batches_pay: bool = False,
        clock: Callable[[], float] = monotonic,
        **options: Any,
    ) -> Server:
        def load() -> Pipeline:
            return Pipeline.load(tiny_bundle, threads=1)

        opener = reopen or load
        scheduler = Scheduler(
            opener(),
            admission=Admission(bounds or Bounds()),
            reopen=opener,
            options=SchedulerOptions(**options),
            clock=clock,
        )
        if batches_pay:
            scheduler.times.best_size = lambda key, most: min(most, scheduler.max_batch)  # type: ignore[method-assign]
        made.append(Server(scheduler))
        if start:
            scheduler.start()
        return made[-1]

    yield make
    for server in made:
        server.scheduler.close()


@pytest.fixture(scope="session")
def api_server(tiny_bundle: Path) -> Iterator[ServerProcess]:
    """A real `ditc serve` process with small bounds. Its model is named after the bundle's directory."""
    bounds = ("--max-steps", "60", "--max-images", "4", "--max-prompt-bytes", "200", "--max-jobs", "2")
    with server_process(tiny_bundle, *bounds) as server:
        yield server
