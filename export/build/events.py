"""What a build reports while it works and when it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ditc.runtime.bundle.build_cost import BuildCost
from ditc.runtime.bundle.manifest import Artifact, Manifest

# A stage is "building" and then "built", or "reused". "working" is only for a progress line.
Status = Literal["working", "reused", "building", "built"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildEvent:
    """What happened to one stage, for progress and for the summary.

    Attributes:
        stage: the stage's name. While "working", it may be a component's name or "memory".
        why: why the stage is built or reused. While "working", what is being done.
        peak_memory_bytes: largest resident size of the process while the stage was built.
        estimated_memory_bytes: the estimate of that peak, made before the stage was built.
    """

    stage: str
    status: Status
    why: str
    seconds: float = 0.0
    size_bytes: int = 0
    peak_memory_bytes: int = 0
    estimated_memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """The finished bundle and what each stage cost.

    Attributes:
        dropped: artifacts of earlier builds that this build removed, as "denoiser fp16 (onnxruntime)".
    """

    bundle: Path
    manifest: Manifest
    events: tuple[BuildEvent, ...]
    seconds: float
    dropped: tuple[str, ...] = ()


class EventLog:
    """Passes each event on at once, and keeps the "reused" and "built" events for the report."""

    def __init__(self, on_event: Callable[[BuildEvent], None]) -> None:
        self.events: list[BuildEvent] = []
        self._on_event = on_event

    def working(self, stage: str, doing: str) -> None:
        """Report what is being done, for a progress line."""
        self._on_event(BuildEvent(stage=stage, status="working", why=doing))

    def building(self, stage: str, why: str) -> None:
        """Report that a stage's build begins."""
        self._on_event(BuildEvent(stage=stage, status="building", why=why))

    def reused(self, stage: str, artifact: Artifact) -> None:
        """Report that a stage is reused from an earlier build."""
        self._keep(
            BuildEvent(stage=stage, status="reused", why="nothing changed", size_bytes=_size_bytes(artifact))
        )

    def built(self, stage: str, why: str, artifact: Artifact, cost: BuildCost) -> None:
        """Report that a stage has been built."""
        self._keep(
            BuildEvent(
                stage=stage,
                status="built",
                why=why,
                seconds=cost.seconds,
                size_bytes=_size_bytes(artifact),
                peak_memory_bytes=cost.peak_memory_bytes,
                estimated_memory_bytes=cost.estimated_memory_bytes,
            )
        )

    def _keep(self, event: BuildEvent) -> None:
        self.events.append(event)
        self._on_event(event)


def _size_bytes(artifact: Artifact) -> int:
    return sum(ref.size_bytes for ref in artifact.files)
