"""The profiler of TensorRT and TensorRT-RTX, which reports every layer of an engine after each run.

Written from NVIDIA's documentation of IProfiler and tested with a stand-in for the library: no GPU has run it yet.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditc.runtime.bench.profile import ExecutedNode
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.gpu import find_gpu
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.session import Tensor
from ditc.runtime.sessions.device import Device, open_device
from ditc.runtime.sessions.registry import BackendRow
from ditc.runtime.sessions.tensorrt import TensorRTSession
from ditc.runtime.sessions.tensorrt_engine import TensorRTContext, TensorRTEngine, load_library


class Layers:
    """What the library reports: the milliseconds of every layer, in the order of execution."""

    def __init__(self, trt: Any) -> None:
        self.runs = 0
        self.seconds: dict[str, float] = defaultdict(float)
        layers = self

        class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined, unused-ignore]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                layers.seconds[layer_name] += ms / 1e3

        self.profiler = Profiler()

    def nodes(self) -> list[ExecutedNode]:
        """The layers with the mean time of a run. TensorRT joins the names of fused layers with " + "."""
        return [
            ExecutedNode(
                name=name,
                kind=layer_kind(name),
                type="",
                seconds=total / max(1, self.runs),
                origins=tuple(re.split(r" \+ |, ", name.strip("{}"))),
            )
            for name, total in self.seconds.items()
        ]


class ProfiledEngine(TensorRTEngine):
    """An engine whose contexts report to a profiler."""

    layers: Layers

    def context(self, profile: int, stream: int) -> TensorRTContext:
        """A context as the engine makes it, with the profiler."""
        context = super().context(profile, stream)
        context.report_to(self.layers.profiler)
        return context


class ProfiledTensorRTSession(TensorRTSession):
    """A session whose engine reports the time of its layers. The first run is not counted."""

    def __init__(self, engine: ProfiledEngine, artifact: Artifact, device: Device, name: str) -> None:
        super().__init__(engine, artifact.spec, device, name=name)
        self._layers, self._first = engine.layers, True

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the session, but it waits until the layers are reported."""
        outputs = super().run(feeds)
        self._device.synchronize()
        if self._first:
            self._first = False
            self._layers.seconds.clear()
        else:
            self._layers.runs += 1
        return outputs

    def executed_nodes(self) -> list[ExecutedNode]:
        """The layers of the runs after the first."""
        return self._layers.nodes()


def open_profiled(
    row: BackendRow, model: Path, artifact: Artifact, options: LoadOptions, device: Device | None
) -> ProfiledTensorRTSession:
    """Open an engine with the profiler on, without the cache of kernels."""
    engine = ProfiledEngine(model, row.name, stage=artifact.spec.name, gpu=find_gpu())
    engine.layers = Layers(load_library(row.name))
    shared = device if device is not None else open_device()
    return ProfiledTensorRTSession(engine, artifact, shared, row.name)


def layer_kind(name: str) -> str:
    """What a layer computes, as far as its name tells: kernels are named after what they fuse."""
    if "__myl_" in name:
        return name.split("__myl_", 1)[1].split("_", 1)[0]
    return "layer"
