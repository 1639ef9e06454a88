"""What is kept for clients is bounded for each of them, and theirs alone."""

from __future__ import annotations

import pytest

from ditc.runtime.serving.api.kept import Kept
from ditc.runtime.serving.refusals import Overloaded


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_item_belongs_to_its_owner() -> None:
    kept: Kept[str] = Kept(most=2, most_bytes=10, seconds=60)
    kept.add("ann", "1", "a picture")
    assert kept.get("ann", "1") == "a picture"
    assert kept.get("bob", "1") is None
    assert kept.of("bob") == []


def test_the_oldest_ended_item_makes_room_and_items_in_work_never_do() -> None:
    kept: Kept[str] = Kept(most=2, most_bytes=10, seconds=60)
    kept.add("ann", "1", "in work")
    kept.add("ann", "2", "ended")
    kept.settle("ann", "2", 1)
    kept.add("ann", "3", "new")
    assert kept.of("ann") == ["in work", "new"]
    with pytest.raises(Overloaded, match="2 requests of this key are in work"):
        kept.add("ann", "4", "too many")


def test_the_oldest_items_go_when_their_bytes_are_too_many() -> None:
    kept: Kept[str] = Kept(most=9, most_bytes=10, seconds=60)
    for id in "123":
        kept.add("ann", id, id)
        kept.settle("ann", id, 4)
    assert kept.of("ann") == ["2", "3"]


def test_an_item_that_is_larger_than_all_bytes_is_not_kept() -> None:
    kept: Kept[str] = Kept(most=9, most_bytes=10, seconds=60)
    kept.add("ann", "1", "large")
    kept.settle("ann", "1", 11)
    assert kept.of("ann") == []


def test_ended_items_expire_and_those_in_work_do_not() -> None:
    clock = Clock()
    kept: Kept[str] = Kept(most=9, most_bytes=10, seconds=60, clock=clock)
    kept.add("ann", "1", "in work")
    kept.add("ann", "2", "ended")
    kept.settle("ann", "2", 1)
    clock.now = 61.0
    assert kept.of("ann") == ["in work"]
    kept.settle("ann", "1", 1)
    clock.now = 122.0
    assert kept.of("ann") == []
    assert not kept._owners  # nothing is left of an owner without items


def test_items_of_owners_who_do_not_come_back_expire_when_others_come() -> None:
    clock = Clock()
    kept: Kept[str] = Kept(most=9, most_bytes=10, seconds=60, clock=clock)
    kept.add("ann", "1", "ended")
    kept.settle("ann", "1", 1)
    clock.now = 61.0
    kept.add("bob", "1", "new")
    assert set(kept._owners) == {"bob"}
