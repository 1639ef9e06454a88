"""Fill a new diffusers directory with what it needs in addition to the converted weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ditc.export.checkpoint.open import Checkpoint
from ditc.runtime.errors import UsageError


def check_free(out: Path) -> None:
    """Raise UsageError if the path exists."""
    if os.path.lexists(out):  # Path.exists raises for a name that is too long
        raise UsageError(f"{out} exists already", hint="give another name, or delete it first")


def copy_others(base: Checkpoint | None, directory: Path, made: Collection[str]) -> dict[str, Any]:
    """Copy every component of base except the scheduler and those named in `made`.

    Returns:
        The copied components' entries of model_index.json.
    """
    if base is None:
        return {}
    names = (set(base.components) | set(base.tokenizers)) - {*made, "scheduler"}
    for name in sorted(names):
        shutil.copytree(base.path / name, directory / name)
    return {name: base.model_index[name] for name in sorted(names)}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented JSON with a newline at the end; parent directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
