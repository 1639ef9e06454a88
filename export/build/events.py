"""What a build tells while it works and when it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ditc.runtime.bundle.build_cost import BuildCost
from ditc.runtime.bundle.manifest import Artifact, Manifest

# working: what else goes on, for a progress line.
Status = Literal["working", "reused", "building", "built"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildEvent:
    """What happened to one stage, for progress and for the summary.

    Attributes:
        stage: its name, or what else the build is busy with.
        why: the reason; while working, what the build is at.
        peak_memory_bytes: largest resident size of the process while the stage was built.
        estimated_memory_bytes: what was expected of it before.
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
        dropped: artifacts of earlier builds that are gone, as "denoiser fp16 (onnxruntime)".
    """

    bundle: Path
    manifest: Manifest
    events: tuple[BuildEvent, ...]
    seconds: float
    dropped: tuple[str, ...] = ()


class EventLog:
    """Tells each event at once, and keeps those that the report names."""

    def __init__(self, on_event: Callable[[BuildEvent], None]) -> None:
        self.events: list[BuildEvent] = []
        self._on_event = on_event

    def working(self, stage: str, doing: str) -> None:
        """For a progress line."""
        self._on_event(BuildEvent(stage=stage, status="working", why=doing))

    def building(self, stage: str, why: str) -> None:
        """A stage is begun."""
        self._on_event(BuildEvent(stage=stage, status="building", why=why))

    def reused(self, stage: str, artifact: Artifact) -> None:
        """A stage is as an earlier build left it."""
        self._keep(
            BuildEvent(stage=stage, status="reused", why="nothing changed", size_bytes=_size_bytes(artifact))
        )

    def built(self, stage: str, why: str, artifact: Artifact, cost: BuildCost) -> None:
        """A stage is done."""
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
