"""A file of prompts: one a line, UTF-8, empty lines skipped."""

from __future__ import annotations

from pathlib import Path

from ditc.runtime.errors import UsageError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file.

    Raises:
        UsageError: it cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot read prompts from {path}: {e}", hint="one prompt a line, UTF-8") from e
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path} holds no prompts", hint="write one prompt a line")
    return prompts
