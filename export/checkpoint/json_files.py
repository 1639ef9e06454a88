"""Read the JSON files of a checkpoint, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ditc.export.checkpoint.file_content import check_content
from ditc.runtime.errors import CheckpointError

# Configs and shard indices have a few MB at most. (A tokenizer.json can have tens of MB, but transformers reads it.)
LARGEST_BYTES = 16 * 2**20
# Of an integer. transformers writes 1e30 with 31 digits for "no limit"; a float ends at 309 digits.
MAX_DIGITS = 40


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: the file is missing, is larger than LARGEST_BYTES, is not JSON (such as a Git LFS pointer), or
            holds something other than an object.
    """
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} does not exist", hint="fetch the checkpoint again") from error
    if size_bytes > LARGEST_BYTES:
        raise CheckpointError(
            f"{path} has {size_bytes} bytes, but a config has at most {LARGEST_BYTES}",
            hint="fetch the file again, or check the path",
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
    except (ValueError, RecursionError) as error:
        check_content(path)
        raise CheckpointError(f"{path} is not JSON: {error}", hint="fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(value).__name__}, not an object", hint="fetch the file again"
        )
    return value


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"the number {digits[:MAX_DIGITS]}... has {len(digits)} digits")
    return int(digits)
