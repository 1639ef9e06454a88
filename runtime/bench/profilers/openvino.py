"""OpenVINO's profiler: its executed graph, with the mean time of every node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditc.runtime.bench.profile import ExecutedNode
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.openvino import CPU, OpenvinoSession
from ditc.runtime.sessions.registry import BackendRow


class ProfiledOpenvinoSession(OpenvinoSession):
    """A session that counts the time of every node."""

    def __init__(self, model: Path, artifact: Artifact, options: LoadOptions) -> None:
        super().__init__(model, artifact.spec, device=options.device.upper() or CPU, threads=options.threads)
        self._settings = {**self._settings, "PERF_COUNT": True}  # it is compiled when it first runs

    def executed_nodes(self) -> list[ExecutedNode]:
        """The nodes of the shapes that ran last. OpenVINO gives whole microseconds, as the mean of all runs."""
        return executed_nodes(self)


def open_profiled(
    row: BackendRow, model: Path, artifact: Artifact, options: LoadOptions, device: Device | None
) -> ProfiledOpenvinoSession:
    """Open a stage with the counters on."""
    return ProfiledOpenvinoSession(model, artifact, options)


def executed_nodes(session: OpenvinoSession) -> list[ExecutedNode]:
    """What OpenVINO executes for the shapes that ran last, in order. Without the counters, all times are 0."""
    ops = session.last_compiled().get_runtime_model().get_ordered_ops()
    executed = [_node(op.get_friendly_name(), op.get_rt_info()) for op in ops]
    return [node for _, node in sorted(executed, key=lambda pair: pair[0])]


def _node(name: str, info: Any) -> tuple[int, ExecutedNode]:
    """The node's place in the order of execution, and the node."""

    def text(key: str) -> str:
        return str(info[key].astype(str)) if key in info else ""

    time = text("execTimeMcs")
    return int(text("execOrder") or 0), ExecutedNode(
        name=name,
        kind=text("layerType"),
        type=text("runtimePrecision"),
        seconds=int(time) / 1e6 if time.isdecimal() else 0.0,
        origins=tuple(origin for origin in text("originalLayersNames").split(",") if origin),
    )
