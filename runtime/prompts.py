"""Reads files of prompts: UTF-8, one prompt per line. Blank lines and lines that start with # are skipped."""

from __future__ import annotations

import sys
from pathlib import Path

from ditc.runtime.errors import UsageError

STDIN = Path("-")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order; "-" is stdin.

    Raises:
        UsageError: the file cannot be read, or holds no prompts.
    """
    return [prompt for _, prompt in numbered_prompts(path)]


def numbered_prompts(path: Path) -> list[tuple[int, str]]:
    """Like `read_prompts`, with the line number of each prompt.

    Raises:
        UsageError: the file cannot be read, or holds no prompts.
    """
    try:
        data = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
    except OSError as e:
        raise UsageError(
            f"cannot read prompts from {path}: {e.strerror or e}",
            hint="pass a UTF-8 file with one prompt per line",
        ) from e
    # Not splitlines, which also splits at form feeds and other characters that a copied prompt may contain.
    lines = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    stripped = [(number, _decode(line, path, number).strip()) for number, line in lines]
    prompts = [(number, line) for number, line in stripped if line and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"{path} holds no prompts", hint="write one prompt per line; # begins a comment")
    return prompts


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"cannot read prompts from {path}, line {number}: not UTF-8 at byte {e.start}",
            hint="save the file as UTF-8",
        ) from e
