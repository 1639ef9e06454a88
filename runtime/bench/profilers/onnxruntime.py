"""ONNX Runtime's profiler. It writes a file of events, one per executed node and run."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from ditc.runtime.bench.profile import ExecutedNode
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.sessions.onnxruntime_cuda import cuda_lack
from ditc.runtime.sessions.registry import BackendRow

KERNEL = "_kernel_time"
RUN = "model_run"


class ProfiledOnnxRuntimeSession(OnnxRuntimeSession):
    """A session whose profiler writes into a folder of its own, which `close` removes."""

    def __init__(self, model: Path, artifact: Artifact, options: LoadOptions) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ditc-profile-")
        on_cpu = options.provider == "cpu" or bool(cuda_lack())
        super().__init__(
            model,
            artifact.spec,
            precision=artifact.precision,
            provider=CPU if on_cpu else None,
            threads=options.threads,
            profile=Path(self._folder.name) / "profile",
        )

    def executed_nodes(self) -> list[ExecutedNode]:
        """The nodes of the runs after the first."""
        return read_events(json.loads(Path(self._session.end_profiling()).read_bytes()))

    def close(self) -> None:
        """Release the graph, and remove the events."""
        super().close()
        self._folder.cleanup()


def open_profiled(
    row: BackendRow, model: Path, artifact: Artifact, options: LoadOptions, device: Device | None
) -> ProfiledOnnxRuntimeSession:
    """Open a stage with the profiler on. On a GPU, it tells how long kernels took to launch, not to run."""
    return ProfiledOnnxRuntimeSession(model, artifact, options)


def read_events(events: list[dict[str, Any]]) -> list[ExecutedNode]:
    """The executed nodes, with the mean time of all runs but the first, in the order of the last run."""
    runs = [event["ts"] for event in events if event["name"] == RUN]
    later = sorted(runs)[1:] or runs
    seconds: dict[str, float] = defaultdict(float)
    last: dict[str, tuple[int, dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(KERNEL) or event["ts"] < min(later):
            continue
        name = event["name"].removesuffix(KERNEL)
        seconds[name] += event["dur"] / 1e6
        last[name] = (event["ts"], event["args"])
    return [
        ExecutedNode(
            name=name,
            kind=arguments.get("op_name", ""),
            type=_type(arguments),
            seconds=seconds[name] / len(later),
        )
        for name, (_, arguments) in sorted(last.items(), key=lambda item: item[1][0])
    ]


def _type(arguments: dict[str, Any]) -> str:
    """The element type of the first result."""
    shapes = arguments.get("output_type_shape") or [{}]
    return next(iter(shapes[0]), "")
