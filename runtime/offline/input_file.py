"""The file of requests: checked as a whole before anything is drawn, then read line by line.

Neither pass keeps lines in memory: the first one keeps 16 bytes per line with an id, to find ids that come twice.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditc.runtime.errors import UsageError
from ditc.runtime.offline.lines import MAX_LINE_BYTES, Line, parse_line

# How many wrong lines an error names. The rest is counted.
NAMED = 10
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class RawLine:
    """A line as it is in the file.

    Attributes:
        number: from 1.
        offset: where it begins, in bytes.
        content: without its line end.
    """

    number: int
    offset: int
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """What the check of a file has found.

    Attributes:
        sha256: of its content.
        lines: how many it has.
        wrong: the errors of its first wrong lines, at most `NAMED`.
        wrong_count: how many lines are wrong.
        repeated: for a line whose id an earlier line has, the number of that line.
    """

    path: Path
    sha256: str
    lines: int
    wrong: tuple[UsageError, ...]
    wrong_count: int
    repeated: dict[int, int]

    def check(self) -> None:
        """Raise UsageError if there are wrong lines. It names the first ones."""
        if not self.wrong:
            return
        listed = "; ".join(f"{error} ({error.hint})" for error in self.wrong)
        more = self.wrong_count - len(self.wrong)
        raise UsageError(
            f"{self.path}: {listed}{f'; and {more} more wrong lines' if more else ''}",
            hint="mend the lines, or pass --skip-invalid to record such lines as failed and draw the others",
        )

    def parse(self, raw: RawLine) -> Line:
        """Read a line, and check the files that it names.

        Raises:
            UsageError: it is wrong, one of its files is, or an earlier line has the same id.
        """
        line = parse_line(raw.content, raw.number)
        if raw.number in self.repeated:
            raise _repeated(line, self.repeated[raw.number])
        line.check_files(self.path.parent)
        return line


def check_input(path: Path) -> InputFile:
    """Read the whole file and check every line, and the beginnings of the pictures that it names.

    Raises:
        UsageError: it cannot be read, or holds no lines.
    """
    sha256, wrong, wrong_count, count = hashlib.sha256(), list[UsageError](), 0, 0
    hashes, numbers = array("Q"), array("Q")
    for raw in raw_lines(path, hashed=sha256):
        count = raw.number
        try:
            line = parse_line(raw.content, raw.number)
            line.check_files(path.parent)
        except UsageError as error:
            wrong_count += 1
            if len(wrong) < NAMED:
                wrong.append(error)
            continue
        if line.id is not None:
            hashes.append(int.from_bytes(hashlib.sha256(line.id.encode()).digest()[:8], "big"))
            numbers.append(line.number)
    if not count:
        raise UsageError(
            f"{path} holds no lines", hint='write one JSON object per line: {"prompt": "a red heart"}'
        )
    repeated = _find_repeated(path, np.array(hashes, np.uint64), np.array(numbers, np.uint64))
    for number, first in list(repeated.items())[: max(0, NAMED - len(wrong))]:
        (line,) = (parse_line(raw.content, number) for raw in raw_lines(path) if raw.number == number)
        wrong.append(_repeated(line, first))
    return InputFile(
        path=path,
        sha256=sha256.hexdigest(),
        lines=count,
        wrong=tuple(wrong),
        wrong_count=wrong_count + len(repeated),
        repeated=repeated,
    )


def raw_lines(path: Path, *, hashed: hashlib._Hash | None = None) -> Iterator[RawLine]:
    """The lines of a file, with their numbers and offsets. A line that is far too long is cut.

    Args:
        hashed: gets all bytes of the file.

    Raises:
        UsageError: the file cannot be read.
    """
    return _read(path, 0, 1, lambda content: None if hashed is None else hashed.update(content))


def lines_of_span(path: Path, offset: int, numbers: Sequence[int]) -> Iterator[RawLine]:
    """The lines with these ascending numbers; the first one begins at the offset. Raises as `raw_lines`."""
    wanted = set(numbers)
    for raw in _read(path, offset, numbers[0], lambda content: None):
        if raw.number in wanted:
            yield raw
        if raw.number == numbers[-1]:
            return


def _read(path: Path, offset: int, number: int, on_bytes: Callable[[bytes], None]) -> Iterator[RawLine]:
    """The lines from an offset on, the first of which has this number."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while content := file.readline(MAX_LINE_BYTES + 2):
                on_bytes(content)
                length, rest = len(content), content
                while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
                    on_bytes(rest)
                    length += len(rest)  # of a line that is too long
                begin = content.removeprefix(_BOM) if number == 1 else content
                yield RawLine(number=number, offset=offset, content=begin.rstrip(b"\r\n"))
                offset += length
                number += 1
    except OSError as e:
        raise UsageError(
            f"cannot read {path}: {e.strerror or e}", hint="pass a UTF-8 file with one JSON object per line"
        ) from e


def _find_repeated(
    path: Path,
    hashes: np.ndarray[tuple[int], np.dtype[np.uint64]],
    numbers: np.ndarray[tuple[int], np.dtype[np.uint64]],
) -> dict[int, int]:
    """The lines whose id an earlier line has, with the number of the first such line."""
    order = np.argsort(hashes, kind="stable")
    equal = hashes[order][1:] == hashes[order][:-1]
    suspects = {int(number) for i in np.flatnonzero(equal) for number in numbers[order[i : i + 2]]}
    if not suspects:
        return {}
    first: dict[str, int] = {}
    repeated: dict[int, int] = {}
    for raw in raw_lines(path):  # different ids may have equal hashes
        if raw.number in suspects:
            name = parse_line(raw.content, raw.number).id
            assert name is not None
            if first.setdefault(name, raw.number) != raw.number:
                repeated[raw.number] = first[name]
    return repeated


def _repeated(line: Line, first: int) -> UsageError:
    return UsageError(
        f"line {line.number}: its id {line.id!r:.80} is that of line {first}",
        hint="give every line an id of its own",
    )
