"""Draws lines with processes of this machine, each of which holds the bundle.

A process that ends, because memory ran out or a library crashed, is replaced, and what it was at is drawn again: one
line at a time, so that only the line that is to blame fails.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from ditc.runtime.child_process import Child, raised
from ditc.runtime.errors import SessionError
from ditc.runtime.offline.input_file import RawLine
from ditc.runtime.offline.lines import parse_line
from ditc.runtime.offline.result import failed

log = logging.getLogger(__name__)

WORKER = "ditc.runtime.offline.worker"
# How many processes may end without a single result between them.
MOST_ENDS = 3


class _Worker:
    """A process, and the lines that it is at.

    Attributes:
        window: how many lines it takes at a time; 0 until it has loaded the bundle.
    """

    def __init__(
        self, asked: Mapping[str, Any], inbox: SimpleQueue[tuple[_Worker, dict[str, Any] | None]]
    ) -> None:
        self.child = Child(WORKER)
        self.asked, self.window = asked, 0
        self.at: dict[int, RawLine] = {}
        self._inbox = inbox
        threading.Thread(target=self._listen, daemon=True).start()
        self.send(asked)

    def send(self, message: Mapping[str, Any]) -> None:
        with suppress(BrokenPipeError):  # its end is noticed by the thread that listens
            self.child.send(json.dumps(message))

    def draw(self, raw: RawLine) -> None:
        self.at[raw.number] = raw
        self.send({"number": raw.number, "content": raw.content.decode()})

    def _listen(self) -> None:
        with suppress(ValueError):  # closed, or half an answer of a process that was killed
            for answer in self.child.stdout:
                self._inbox.put((self, json.loads(answer)))
        self._inbox.put((self, None))


class _Supply:
    """The lines that are still to be drawn.

    Attributes:
        suspects: those that a process was at when it ended. Each is drawn alone.
        alone: the numbers of those that are drawn alone at this moment.
    """

    def __init__(self, lines: Iterator[RawLine]) -> None:
        self._lines = lines
        self._next = next(lines, None)
        self.suspects = deque[RawLine]()
        self.alone: set[int] = set()

    @property
    def empty(self) -> bool:
        return self._next is None and not self.suspects

    def fill(self, worker: _Worker) -> None:
        """Give a process as many lines as it has room for."""
        if self.suspects:
            if worker.window and not worker.at:
                raw = self.suspects.popleft()
                self.alone.add(raw.number)
                worker.draw(raw)
            return
        while self._next is not None and len(worker.at) < worker.window and not self.alone & worker.at.keys():
            worker.draw(self._next)
            self._next = next(self._lines, None)


def draw_lines(lines: Iterator[RawLine], asked: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The results of the lines, in the order in which they are there.

    Args:
        lines: checked lines. One is taken when a process has room for it.
        asked: for every process, its first input; see worker.py.

    Raises:
        DitcError: the bundle cannot be loaded, a picture cannot be written, or processes end again and again.
    """
    supply, ends = _Supply(lines), 0
    inbox = SimpleQueue[tuple[_Worker, dict[str, Any] | None]]()
    workers = [_Worker(each, inbox) for each in asked]
    try:
        while not supply.empty or any(worker.at for worker in workers):
            worker, answer = inbox.get()
            if answer is None:
                ends += 1
                how = worker.child.how_it_ended()
                if ends > MOST_ENDS:
                    raise SessionError(
                        f"{ends} processes have ended, the last of which {how}",
                        hint="if memory ran out, use fewer --workers or a smaller --max-batch",
                    )
                for raw in worker.at.values():
                    if raw.number in supply.alone:
                        supply.alone.remove(raw.number)
                        yield _lost(raw, how)
                    else:
                        supply.suspects.append(raw)
                worker.child.close()
                workers[workers.index(worker)] = _Worker(worker.asked, inbox)
            elif "error" in answer:
                raise raised(answer)
            elif "window" in answer:
                worker.window = answer["window"]
                if answer["uncertified"]:
                    log.warning("the bundle is not certified: %s", answer["uncertified"])
            else:
                ends, result = 0, answer["result"]
                del worker.at[result["line"]]
                supply.alone.discard(result["line"])
                yield result
            for each in workers:
                supply.fill(each)
    finally:
        for worker in workers:
            worker.child.close(at_once=True)


def _lost(raw: RawLine, how: str) -> dict[str, Any]:
    line = parse_line(raw.content, raw.number)
    message = f"the process that drew this line {how}, twice"
    return failed(line.number, line.id, message, "if memory ran out, ask for fewer or smaller pictures")
