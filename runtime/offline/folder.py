"""The output folder of an offline batch. After a kill at any moment, the same command goes on with it.

    out/
      run.json          which bundle, input and options the folder belongs to
      results.jsonl     one JSON object per finished line: settings, digests of its pictures, or why it failed
      pictures/0000/    PNG files, named after the line's number; 10,000 lines per folder
      videos/0000/      the same for videos, in the place of pictures

A line is finished when its result is in results.jsonl, with a line end. Its pictures were written before that. Results
come in the order in which lines finish; when all are there, they are put into the order of the input.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import filelock

from ditc.runtime.atomic import atomic_path, output_error, remove_leftovers, write_atomic
from ditc.runtime.errors import OutputError, UsageError
from ditc.runtime.offline.result import DONE, files_of

RUN, RESULTS, LOCK = "run.json", "results.jsonl", ".lock"
PICTURES, VIDEOS = "pictures", "videos"
LINES_PER_FOLDER = 10_000
# The form of run.json and results.jsonl. A folder of another form is not continued.
FORMAT = 1

_WAITING, _DONE, _FAILED = 0, 1, 2


def file_path(place: str, line: int, index: int, count: int, suffix: str) -> Path:
    """Where a picture or video of a line lies, relative to the folder.

    Args:
        place: PICTURES or VIDEOS.
        count: how many of them the line has.
    """
    name = f"{line:08d}" if count == 1 else f"{line:08d}-{index}"
    return Path(place) / f"{line // LINES_PER_FOLDER:04d}" / f"{name}.{suffix}"


class RunFolder:
    """An output folder that this process alone writes results to. It holds 9 bytes per line of the input in memory.

    Args:
        lines: how many the input has.

    Attributes:
        done, failed: how many lines have ended so.
    """

    def __init__(self, path: Path, lines: int) -> None:
        self.path = path
        self._lines = lines
        self._status = bytearray(lines + 1)
        self._offsets = array("q", bytes(8 * (lines + 1)))
        self._in_order, self._last = True, 0
        self._file = self._read()

    @property
    def done(self) -> int:
        return self._status.count(_DONE)

    @property
    def failed(self) -> int:
        return self._status.count(_FAILED)

    @property
    def ended(self) -> int:
        """How many lines have a result."""
        return self.done + self.failed

    def waits(self, line: int, *, retry_failed: bool) -> bool:
        """Whether a line is still to be drawn."""
        return self._status[line] == _WAITING or (retry_failed and self._status[line] == _FAILED)

    def add(self, result: Mapping[str, Any]) -> None:
        """Keep the result of a line.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            self._note(result, self._file.tell())
            self._file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as e:
            raise output_error(self.path / RESULTS, e, "choose another -o") from e

    def finish(self) -> None:
        """Put the results into the order of the input, and leave out those that later ones have replaced."""
        if self._in_order:
            return
        results = self.path / RESULTS
        with atomic_path(results) as partial, partial.open("wb") as ordered, results.open("rb") as file:
            for line in range(1, self._lines + 1):
                if self._status[line]:
                    file.seek(self._offsets[line])
                    ordered.write(file.readline())

    def close(self) -> None:
        self._file.close()

    def _note(self, result: Mapping[str, Any], offset: int) -> None:
        line = result["line"]
        self._in_order = self._in_order and line > self._last
        self._last = line
        self._status[line] = _DONE if result["status"] == DONE else _FAILED
        self._offsets[line] = offset

    def _read(self) -> IO[bytes]:
        """Read what earlier runs have written, and open the file for more. Half a line at its end is cut off."""
        path = self.path / RESULTS
        try:
            file = path.open("a+b")
            file.seek(0)
            offset = 0
            for number, content in enumerate(iter(file.readline, b""), start=1):
                if not content.endswith(b"\n"):
                    break
                result = _parse_result(content, path, number, self._lines)
                self._note(result, offset)
                if not all((self.path / file["file"]).is_file() for file in files_of(result) if file):
                    self._status[result["line"]] = _WAITING  # somebody has removed a file
                offset += len(content)
            file.truncate(offset)
            file.seek(offset)
        except OSError as e:
            raise output_error(path, e, "choose another -o") from e
        return file


@contextmanager
def open_folder(path: Path, run: Mapping[str, Any], lines: int) -> Iterator[RunFolder]:
    """Make the folder, or go on with it.

    Args:
        run: what decides the pictures: the digests of bundle and input, and the options. See `check_run`.
        lines: how many the input has.

    Raises:
        UsageError: the folder belongs to another run, holds other files, or another process works in it.
        OutputError: it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise output_error(path, e, "choose another -o") from e
    lock = filelock.FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as e:
        raise OutputError(
            f"another process is working in {path}",
            hint="wait until it has ended; the lock of a killed process is freed by itself",
        ) from e
    except OSError as e:
        raise output_error(path, e, "choose another -o") from e
    try:
        if not (path / RUN).exists():
            _check_empty(path)
            write_atomic(path / RUN, json.dumps({"format": FORMAT, **run}, indent=1) + "\n")
        else:
            check_run(path, run)
        for place in (path, *(path / PICTURES).glob("*"), *(path / VIDEOS).glob("*")):
            remove_leftovers(place)
        folder = RunFolder(path, lines)
        try:
            yield folder
        finally:
            folder.close()
    finally:
        lock.release()


def check_run(path: Path, run: Mapping[str, Any]) -> None:
    """Refuse a folder that belongs to another run, and say what differs.

    Raises:
        UsageError: the bundle, the input or an option is another one, or run.json cannot be read.
    """
    hint = "choose another -o, or remove the folder"
    try:
        known = json.loads((path / RUN).read_bytes())
        if not isinstance(known, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"{path / RUN} cannot be read: {e}", hint=hint) from e
    wanted = {"format": FORMAT, **run}
    other = [name for name in wanted if known.get(name) != wanted[name]]
    if other:
        told = ", ".join(f"{name} {known.get(name)!r:.80} instead of {wanted[name]!r:.80}" for name in other)
        raise UsageError(f"{path} belongs to another run: it has {told}", hint=hint)


def _check_empty(path: Path) -> None:
    found = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
    if found:
        raise UsageError(
            f"{path} holds other files, such as {found[0]!r:.80}, and no {RUN}",
            hint="choose a new folder as -o",
        )


def _parse_result(content: bytes, path: Path, number: int, lines: int) -> dict[str, Any]:
    try:
        result = json.loads(content)
        if not (0 < result["line"] <= lines and result["status"] and isinstance(files_of(result), list)):
            raise ValueError("a field has no possible value")
        assert isinstance(result, dict)
        return result
    except (ValueError, TypeError, KeyError, RecursionError, AssertionError) as e:
        raise UsageError(
            f"{path}, line {number}: this is not a result of a batch: {e}",
            hint="somebody has changed the file; choose another -o, or remove this line and those after it",
        ) from e
