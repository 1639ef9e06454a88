"""One offline batch: the lines that have no result yet are drawn, and each result is kept when it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any

from ditc.runtime.errors import UsageError
from ditc.runtime.offline.folder import RunFolder
from ditc.runtime.offline.input_file import InputFile, RawLine, raw_lines
from ditc.runtime.offline.result import DONE, failed, files_of

# Draws checked lines and returns their results, in any order.
Draw = Callable[[Iterator[RawLine]], Iterator[dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run has done.

    Attributes:
        lines: of the input.
        done, failed: how many of these have ended so, in this and earlier runs.
        drawn_now, failed_now: how many of those this run has added.
        pictures: how many pictures or videos this run has written.
        seconds: how long this run took.
    """

    lines: int
    done: int
    failed: int
    drawn_now: int
    failed_now: int
    pictures: int
    seconds: float

    @property
    def pictures_per_second(self) -> float:
        return self.pictures / self.seconds if self.seconds else 0.0


def run_batch(
    source: InputFile,
    folder: RunFolder,
    draw: Draw,
    *,
    retry_failed: bool = False,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
) -> Summary:
    """Draw the lines that have no result yet.

    Args:
        source: the checked file. Its wrong lines are recorded as failed.
        retry_failed: draw lines again that have failed.

    Raises:
        DitcError: as `draw`, or a result cannot be written. What is written stays.
    """
    begin, pictures = monotonic(), 0
    done, lost = 0, 0

    def keep(result: dict[str, Any]) -> None:
        nonlocal pictures, done, lost
        folder.add(result)
        pictures += sum(file is not None for file in files_of(result))
        done += result["status"] == DONE
        lost += result["status"] != DONE
        on_result(result)

    def pending() -> Iterator[RawLine]:
        for raw in raw_lines(source.path):
            if not folder.waits(raw.number, retry_failed=retry_failed):
                continue
            try:
                source.parse(raw)
            except UsageError as error:
                keep(failed(raw.number, None, str(error), error.hint))
            else:
                yield raw

    for result in draw(pending()):
        keep(result)
    folder.finish()
    return Summary(
        lines=source.lines,
        done=folder.done,
        failed=folder.failed,
        drawn_now=done,
        failed_now=lost,
        pictures=pictures,
        seconds=monotonic() - begin,
    )
