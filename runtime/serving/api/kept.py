"""What is kept for clients: bounded for each of them in number, in bytes and in time, and invisible to the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Generic, TypeVar

from ditc.runtime.serving.refusals import Overloaded

T = TypeVar("T")


@dataclass(slots=True)
class _Entry(Generic[T]):
    item: T
    size: int = 0
    expires: float | None = None  # None while it is in work


class Kept(Generic[T]):
    """Items by owner and id. Those in work are never removed; of the others, the oldest go first.

    Args:
        most: items of one owner.
        most_bytes: of one owner's items that are not in work.
        seconds: how long an item is kept after its work.
    """

    def __init__(
        self, *, most: int, most_bytes: int, seconds: float, clock: Callable[[], float] = monotonic
    ) -> None:
        self.most, self.most_bytes, self.seconds = most, most_bytes, seconds
        self._clock = clock
        self._owners: dict[str, dict[str, _Entry[T]]] = {}  # ids in the order of their last change
        self._next_sweep = clock() + seconds

    def add(self, owner: str, id: str, item: T) -> None:
        """Keep an item that is in work.

        Raises:
            Overloaded: the owner has too many items in work.
        """
        self._sweep()
        self.check_room(owner)
        while len(self._owners.get(owner, {})) >= self.most:
            self._remove_oldest(owner)
        self._owners.setdefault(owner, {})[id] = _Entry(item)

    def check_room(self, owner: str) -> None:
        """Raise Overloaded if an owner has as many items in work as it may have."""
        self._expire(owner)
        in_work = sum(entry.expires is None for entry in self._owners.get(owner, {}).values())
        if in_work >= self.most:
            raise Overloaded(
                f"{self.most} requests of this key are in work, which is the most",
                hint="wait until one of them has ended",
                retry_after=1.0,
            )

    def settle(self, owner: str, id: str, size: int) -> None:
        """The work of an item has ended: from now on it counts with this many bytes, and expires."""
        self._expire(owner)
        entries = self._owners.get(owner, {})
        if id not in entries:
            return
        entry = entries.pop(id)
        entry.size, entry.expires = size, self._clock() + self.seconds
        entries[id] = entry  # now the newest
        while sum(one.size for one in entries.values()) > self.most_bytes:
            self._remove_oldest(owner)

    def get(self, owner: str, id: str) -> T | None:
        """The item; None if there is none, or it belongs to somebody else."""
        self._expire(owner)
        entry = self._owners.get(owner, {}).get(id)
        return None if entry is None else entry.item

    def remove(self, owner: str, id: str) -> None:
        """Forget an item."""
        entries = self._owners.get(owner, {})
        entries.pop(id, None)
        if not entries:
            self._owners.pop(owner, None)

    def of(self, owner: str) -> list[T]:
        """All items of an owner."""
        self._expire(owner)
        return [entry.item for entry in self._owners.get(owner, {}).values()]

    def _remove_oldest(self, owner: str) -> None:
        ended = (id for id, entry in self._owners[owner].items() if entry.expires is not None)
        self.remove(owner, next(ended))

    def _expire(self, owner: str) -> None:
        now = self._clock()
        for id in [
            id
            for id, entry in self._owners.get(owner, {}).items()
            if entry.expires is not None and entry.expires <= now
        ]:
            self.remove(owner, id)

    def _sweep(self) -> None:
        """Expire the items of owners who do not come back: after at most twice their time, if others add items."""
        if self._clock() >= self._next_sweep:
            self._next_sweep = self._clock() + self.seconds
            for owner in list(self._owners):
                self._expire(owner)
