"""The prompts that calibration draws. A prompt file for calibration is checked more strictly than one for drawing."""

from __future__ import annotations

from pathlib import Path

from ditc.runtime.errors import UsageError
from ditc.runtime.prompts import numbered_prompts

# The built-in prompts cover subjects, styles, colours, counts, lengths and languages.
GENERAL = Path(__file__).parent / "prompts" / "general.txt"
LONGEST = 4000  # characters; a longer line shows that the file is not a list of prompts


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order.

    Raises:
        UsageError: the file cannot be read or has no prompts, or a line is not a prompt or occurs twice. The message
            names the line.
    """
    prompts: dict[str, int] = {}
    for number, line in numbered_prompts(path):
        _check(line, path, number, prompts)
        prompts[line] = number
    return list(prompts)


def _check(line: str, path: Path, number: int, earlier: dict[str, int]) -> None:
    if line in earlier:
        raise UsageError(
            f"{path}, line {number}: this is the same prompt as line {earlier[line]}",
            hint="every prompt counts once: remove one of the two lines",
        )
    if len(line) > LONGEST:
        raise UsageError(
            f"{path}, line {number} has {len(line)} characters, but a prompt has at most {LONGEST}",
            hint="write one prompt per line",
        )
    if not all(character.isprintable() or character == "\t" for character in line):
        raise UsageError(
            f"{path}, line {number} has control characters", hint="use a text file with one prompt per line"
        )
