"""Prompt files: one prompt a line, UTF-8. Blank lines and lines that start with # are skipped."""

from __future__ import annotations

from pathlib import Path

from ditc.runtime.errors import UsageError

# 256 prompts over subjects, styles, colours, counts, lengths and languages.
GENERAL = Path(__file__).parent / "prompts" / "general.txt"
LONGEST = 4000  # characters; a longer line is a file in another form, not a prompt


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order.

    Raises:
        UsageError: the file cannot be read or has no prompts, or a line is no prompt; names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UsageError(
            f"cannot read prompts from {path}: {e.strerror or e}", hint="one prompt a line, UTF-8"
        ) from e
    prompts: dict[str, int] = {}
    for number, raw in enumerate(data.split(b"\n"), start=1):
        line = _decode(raw, path, number).strip()
        if not line or line.startswith("#"):
            continue
        _check(line, path, number, prompts)
        prompts[line] = number
    if not prompts:
        raise UsageError(f"{path} holds no prompts", hint="write one prompt a line")
    return list(prompts)


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{path}, line {number}: not UTF-8 at byte {e.start}", hint="save the file as UTF-8"
        ) from e


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
