"""A least-recently-used cache bounded in bytes: a conditioning row of a large model is 54 to 161 MB."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

from ditc.runtime.session import Array

DEFAULT_BYTES = 512 * 2**20


class RowCache:
    """Named arrays by key. Threads can share it. Values are computed outside the lock."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self.hits = 0
        self.misses = 0
        self._rows: OrderedDict[Hashable, Mapping[str, Array]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """The cached arrays, or those that `compute` returns, which are then cached."""
        with self._lock:
            if key in self._rows:
                self._rows.move_to_end(key)
                self.hits += 1
                return self._rows[key]
            self.misses += 1
        row = compute()
        with self._lock:
            self._insert(key, row)
        return row

    def clear(self) -> None:
        """Remove all rows."""
        with self._lock:
            self._rows.clear()
            self.size_bytes = 0

    def _insert(self, key: Hashable, row: Mapping[str, Array]) -> None:
        size = _size(row)
        if key in self._rows or size > self.max_bytes:
            return
        self._rows[key] = row
        self.size_bytes += size
        while self.size_bytes > self.max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self.size_bytes -= _size(oldest)


def _size(row: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in row.values())
