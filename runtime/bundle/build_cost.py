"""What building an artifact cost: the part of the build's records in a bundle that the runtime reads.

The records are in the folder `.build`, which export/build/journal.py describes. A bundle that was copied without that
folder is a whole bundle; it only cannot tell what it cost.
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
        peak_memory_bytes: largest resident size of the process. estimated_memory_bytes: what was expected before.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    estimated_memory_bytes: int = 0


def record_path(bundle: Path, name: str, key: str) -> Path:
    """The record of what was made under a name from inputs with that key."""
    return bundle / FOLDER / f"{name}-{key[:16]}.json"


def artifact_record(stage: str, backend: Backend) -> str:
    """The name that the records of a stage's graphs have, or those of its engines."""
    row = find_row(backend)  # None for a backend of a newer version, whose record this version does not read
    return stage if row is not None and not row.builds_engines else f"engine-{stage}"


def read_cost(bundle: Path, stage: str, artifact: Artifact) -> BuildCost | None:
    """What the artifact cost, None where no record says so."""
    name = artifact_record(stage, artifact.backend)
    try:
        record = json.loads(record_path(bundle, name, artifact.key).read_bytes())
        return from_json(BuildCost, record["cost"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
