"""What the build of an artifact cost: the only part of a bundle's build records that the runtime reads.

The records are in the folder `.build`, which export/build/journal.py describes. A bundle works without that folder, but
then its costs are unknown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ditc.runtime.bundle.jsondata import from_json
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.sessions.registry import find_row
from ditc.runtime.spec import Backend

FOLDER = ".build"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildCost:
    """Time and memory of one artifact's build.

    Attributes:
        peak_memory_bytes: the largest resident size of the process.
        estimated_memory_bytes: the estimate that was made before the build.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    estimated_memory_bytes: int = 0


def record_path(bundle: Path, name: str, key: str) -> Path:
    """The path of a record: it has a name, and the build key of what was built."""
    return bundle / FOLDER / f"{name}-{key[:16]}.json"


def artifact_record(stage: str, backend: Backend) -> str:
    """The name of the records of a stage's graphs, or of its engines if the backend runs engines."""
    row = find_row(backend)  # None for a backend of a newer version, whose record this version does not read
    return stage if row is not None and not row.builds_engines else f"engine-{stage}"


def read_cost(bundle: Path, stage: str, artifact: Artifact) -> BuildCost | None:
    """What the artifact's build cost; None if there is no readable record of it."""
    name = artifact_record(stage, artifact.backend)
    try:
        record = json.loads(record_path(bundle, name, artifact.key).read_bytes())
        return from_json(BuildCost, record["cost"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
