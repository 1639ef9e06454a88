"""Runs one stage with its library's profiler on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.session import Array, ComputeDevice, Session, Tensor, to_numpy
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.registry import row_of
from ditc.runtime.spec import StageSpec

# A profile of this length is steady. Long stages run at least a few times, short ones not for ever.
SECONDS, LEAST_RUNS, MOST_RUNS = 1.5, 3, 100


class FirstInputs:
    """A session that keeps the inputs of its first run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.feeds: dict[str, Array] | None = None

    @property
    def spec(self) -> StageSpec:
        return self._session.spec

    @property
    def device(self) -> ComputeDevice:
        return self._session.device

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the session does."""
        if self.feeds is None:
            self.feeds = {name: np.array(to_numpy(tensor)) for name, tensor in feeds.items()}
        return self._session.run(feeds)

    def close(self) -> None:
        """As the session does."""
        self._session.close()


def profile_stage(
    bundle: Path,
    artifact: Artifact,
    options: LoadOptions,
    feeds: Mapping[str, Array],
    device: Device | None,
) -> dict[str, Any] | None:
    """Open the stage once more with the profiler, and run it.

    Returns:
        the mean time of a run in seconds, profiler included, and the executed nodes; None if the backend has no
        profiler.
    """
    row = row_of(artifact.backend)
    if row.profile is None:
        return None
    session = row.profile(row, bundle / artifact.file.path, artifact, options, device)
    try:
        session.run(feeds)  # compiles and allocates; the profilers leave it out
        times: list[float] = []
        while len(times) < MOST_RUNS and (len(times) < LEAST_RUNS or sum(times) < SECONDS):
            begin = perf_counter()
            for tensor in session.run(feeds).values():
                to_numpy(tensor)
            times.append(perf_counter() - begin)
        nodes = [asdict(node) for node in session.executed_nodes()]
    finally:
        session.close()
    return {"run_s": sum(times) / len(times), "runs": len(times), "nodes": nodes}
