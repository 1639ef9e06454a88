"""The prompts that calibration draws, and what it asks of a file of prompts beyond that it can be read."""

from __future__ import annotations

from pathlib import Path

from ditc.runtime.errors import UsageError
from ditc.runtime.prompts import numbered_prompts

# Prompts over subjects, styles, colours, counts, lengths and languages.
GENERAL = Path(__file__).parent / "prompts" / "general.txt"
LONGEST = 4000  # characters; a longer line is a file in another form, not a prompt


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order.

    Raises:
        UsageError: the file cannot be read or has no prompts, or a line is no prompt; names the line.
    """
    prompts: dict[str, int] = {}
    for number, line in numbered_prompts(path):
        _check(line, path, number, prompts)
        prompts[line] = number
    return list(prompts)


def _check(line: str, path: Path, number: int, earlier: dict[str, int]) -> None:
    if line in earlier:
        raise UsageError(
            f"{path}, line {number}: the same prompt as line {earlier[line]}",
            hint="a prompt counts once: remove one of the lines",
        )
    if len(line) > LONGEST:
        raise UsageError(
            f"{path}, line {number}: {len(line)} characters, at most {LONGEST}", hint="one prompt a line"
        )
    if not all(character.isprintable() or character == "\t" for character in line):
        raise UsageError(f"{path}, line {number}: control characters", hint="is this a text file?")
