"""What a build tells while it works and when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ditc.runtime.bundle.manifest import Manifest

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
