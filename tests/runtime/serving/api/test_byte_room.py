"""The bytes of requests are bounded exactly, and seconds become the nearest number of frames."""

from __future__ import annotations

import threading

import pytest

from ditc.runtime.bundle.manifest import LatentSpec
from ditc.runtime.serving.api.byte_room import ByteRoom, Need
from ditc.runtime.serving.api.kinds import nearest_frames
from ditc.runtime.serving.refusals import Overloaded


def test_room_is_taken_and_given_back_once() -> None:
    room = ByteRoom(100, "frames")
    first = room.take(Need(60))
    with pytest.raises(Overloaded, match="60 of at most 100 bytes") as full:
        room.take(Need(41))
    assert (full.value.status, full.value.code) == (429, "overloaded") and full.value.retry_after
    second = room.take(Need(40))
    first(), first()
    assert room.taken == 40
    second()
    assert room.taken == 0
    with pytest.raises(Overloaded) as never:
        room.take(Need(101))
    assert (never.value.status, never.value.code, never.value.retry_after) == (400, "too_much_work", None)
    assert room.taken == 0


def test_what_one_worker_needs_in_passing_counts_once() -> None:
    room = ByteRoom(100, "frames")
    small, large = room.take(Need(10, 20, "clips")), room.take(Need(10, 40, "clips"))
    assert room.taken == 20 + 40
    with pytest.raises(Overloaded, match="60 of at most 100 bytes of memory, and those of this one need 50"):
        room.take(Need(10, 40, "others"))  # both may be at work at one time
    large()
    assert room.taken == 10 + 20
    other = room.take(Need(10, 40, "others"))
    small(), other()
    assert room.taken == 0
    with pytest.raises(Overloaded, match="need 101 bytes of memory, of at most 100"):
        room.take(Need(51, 50, "clips"))


def test_threads_never_take_more_than_there_is() -> None:
    room, most, taken = ByteRoom(10, "frames"), list[int](), list[object]()

    def work() -> None:
        for _ in range(200):
            try:
                give_back = room.take(Need(3))
            except Overloaded:
                continue
            most.append(room.taken)
            taken.append(give_back)
            give_back()

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert taken and max(most) <= 10 and room.taken == 0


@pytest.mark.parametrize(
    ("wanted", "frames"), [(80, 81), (81, 81), (82.9, 81), (83, 85), (1, 1), (0.1, 1), (2.9, 1), (3, 5)]
)
def test_the_nearest_number_of_frames_has_whole_latent_frames(wanted: float, frames: int) -> None:
    latents = LatentSpec(channels=16, scale_factor=8, frames_per_cell=4)
    assert nearest_frames(wanted, latents) == frames
