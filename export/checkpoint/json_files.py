"""JSON from a checkpoint: data only, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ditc.runtime.errors import CheckpointError

# A tokenizer.json has tens of MB; configs and indices a few. More is not a config.
LARGEST_BYTES = 16 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: missing, not JSON, not an object, or absurdly large.
    """
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} does not exist", hint="fetch the checkpoint again") from error
    if size_bytes > LARGEST_BYTES:
        raise CheckpointError(f"{path} has {size_bytes} bytes; a config has at most {LARGEST_BYTES}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint="fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value
