"""The memory that opened models share. To make room, the least recently used are closed, and none that is in use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from time import monotonic

from ditc.runtime.errors import UsageError
from ditc.runtime.serving.model import Model
from ditc.runtime.serving.refusals import Unavailable
from ditc.runtime.serving.slot import Slot

log = logging.getLogger(__name__)

# How many seconds a load waits for models that are in use to give back their memory.
ROOM_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An opened model.

    Attributes:
        used: when it was last used; earlier goes first.
        stays: whether it must not be closed, because it is in use or about to be.
    """

    name: str
    size_bytes: int
    used: float
    stays: bool


def to_close(held: Sequence[Held], budget: int) -> tuple[str, ...] | None:
    """The models to close so that the others fit into the budget. None if too many of them must stay.

    Args:
        held: all models that are open.
        budget: bytes.
    """
    excess = sum(one.size_bytes for one in held) - budget
    chosen: list[str] = []
    for one in sorted(held, key=lambda one: one.used):
        if excess <= 0:
            break
        if not one.stays:
            chosen.append(one.name)
            excess -= one.size_bytes
    return tuple(chosen) if excess <= 0 else None


class Room:
    """Closes models. Threads can share it.

    Args:
        slots: all names.
        budget: bytes that all models may take together; None sets no bound.

    Attributes:
        changed: the lock of the slots and of this object, notified when a model has fewer users or is closed.
        retired: versions that new requests do not get any more, until they are closed.
        closing: whether the server ends.
    """

    def __init__(self, slots: Collection[Slot], budget: int | None) -> None:
        self.changed = threading.Condition()
        self.retired: set[Model] = set()
        self.closing = False
        self._slots, self._budget = slots, budget

    def retire(self, model: Model) -> None:
        """Close a version after its last request. The caller holds the lock."""
        self.retired.add(model)
        if model.users == 0:
            self.close_apart(model)

    def close_apart(self, model: Model) -> None:
        """Close a version on a thread of its own, because that waits for the step that is running."""

        def close() -> None:
            model.scheduler.close()
            with self.changed:
                self.retired.discard(model)
                self.changed.notify_all()
            log.info("%s version %.12s is closed", model.name, model.digest)

        threading.Thread(target=close, name="ditc-close", daemon=True).start()

    def make_room(self, slot: Slot, needed: int) -> None:
        """Close models that are not in use, and wait until they are, so that the bundle fits into the budget.

        Raises:
            UsageError: it would not fit alone.
            Unavailable: those that would have to go are in use.
        """
        budget, end = self._budget, monotonic() + ROOM_SECONDS
        if budget is None:
            return
        if needed > budget:
            raise UsageError(
                f"{slot.bundle} takes about {needed / 1e9:.2f} GB, and the memory budget is {budget / 1e9:.2f} GB",
                hint="set a larger --memory-budget",
            )
        with self.changed:
            while True:
                closable = to_close(self._held(slot), budget - needed)
                if closable is not None:
                    self._close_idle(closable, slot)
                    if self._taken_bytes() + needed <= budget:
                        return
                left = end - monotonic()
                if (
                    left <= 0
                    or self.closing
                    or (slot.model is not None and needed + slot.model.size_bytes > budget)
                ):
                    raise Unavailable(
                        f"there is no memory for {slot.name} beside what is in use",
                        hint="come back later",
                        retry_after=5.0,
                    )
                self.changed.wait(left)

    def _held(self, slot: Slot) -> list[Held]:
        """The models that are open, of which this one stays. The caller holds the lock."""
        return [
            Held(
                name=one.name,
                size_bytes=one.model.size_bytes,
                used=one.used,
                stays=one is slot or one.model.users + one.waiting > 0,
            )
            for one in self._slots
            if one.model is not None
        ]

    def _close_idle(self, names: Sequence[str], slot: Slot) -> None:
        """Close models that are not in use. The caller holds the lock."""
        for name in names:
            idle = next(one for one in self._slots if one.name == name)
            if idle.model is not None:
                log.info("%s makes room for %s", name, slot.name)
                self.retire(idle.model)
                idle.model = None

    def _taken_bytes(self) -> int:
        """What all models take, also those that are being closed. The caller holds the lock."""
        opened = [slot.model for slot in self._slots if slot.model is not None]
        return sum(model.size_bytes for model in (*opened, *self.retired))

    def keep_to_budget(self, slot: Slot) -> None:
        """Close others if a model takes more than its files, which is all that was known before. Needs the lock."""
        if self._budget is not None:
            self._close_idle(to_close(self._held(slot), self._budget) or (), slot)
