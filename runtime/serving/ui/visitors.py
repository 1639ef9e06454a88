"""Who looks at the page, and what is being drawn for them: so that nothing is drawn for somebody who has left."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A page opens its stream of events right after it has asked for pictures.
SECONDS_TO_OPEN_A_STREAM = 10.0
# What a visit may ask for while it reads no events. Gradio keeps the answers until it does, some kilobytes each.
MOST_UNREAD = 8
# Of so many visits Gradio keeps answers; the longest unheard-of go first.
MOST_VISITS = 2000


class Visitors:
    """Knows the open streams of events, and the work, of every visit of the page. Threads can share it."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        self._unread = OrderedDict[str, int]()
        self._work: defaultdict[str, set[Callable[[], None]]] = defaultdict(set)
        self._changed = threading.Condition()

    def may_ask(self, visit: str) -> bool:
        """Note that a visit asks for something. False if it has asked too often without reading the answers."""
        with self._changed:
            if self._streams[visit]:
                return True
            unread = self._unread[visit] = self._unread.pop(visit, 0) + 1
            if len(self._unread) > MOST_VISITS:
                self._unread.popitem(last=False)
            return unread <= MOST_UNREAD

    @contextmanager
    def streaming(self, visit: str) -> Iterator[None]:
        """A page reads events inside the block. Its work is cancelled when the last stream of the visit ends."""
        with self._changed:
            self._streams[visit] += 1
            self._unread.pop(visit, None)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._streams[visit] -= 1
                left = not self._streams[visit]
                if left:
                    del self._streams[visit]
            if left:
                self.cancel(visit)

    def is_streaming(self, visit: str, *, wait: float = SECONDS_TO_OPEN_A_STREAM) -> bool:
        """Whether somebody reads the events of a visit; waits so many seconds for it."""
        with self._changed:
            return self._changed.wait_for(lambda: self._streams[visit] > 0, timeout=wait)

    @contextmanager
    def working(self, visit: str, cancel: Callable[[], None]) -> Iterator[None]:
        """Work is done for a visit inside the block, and `cancel` ends it. It is called at the end in any case."""
        with self._changed:
            self._work[visit].add(cancel)
            unread = self._streams[visit] == 0
        try:
            if unread:  # the page was closed meanwhile
                cancel()
            yield
        finally:
            with self._changed:
                self._work[visit].discard(cancel)
                if not self._work[visit]:
                    del self._work[visit]
            cancel()

    def cancel(self, visit: str) -> None:
        """End all work of a visit."""
        with self._changed:
            cancels = list(self._work.get(visit, ()))
        for cancel in cancels:
            cancel()
