"""The bytes of decoded frames are bounded exactly, and seconds become the nearest number of frames."""

from __future__ import annotations

import threading

import pytest

from ditc.runtime.bundle.manifest import LatentSpec
from ditc.runtime.serving.api.frame_room import FrameRoom
from ditc.runtime.serving.api.kinds import nearest_frames
from ditc.runtime.serving.refusals import Overloaded


def test_room_is_taken_and_given_back_once() -> None:
    room = FrameRoom(100)
    first = room.take(60)
    with pytest.raises(Overloaded, match="60 of at most 100 bytes") as full:
        room.take(41)
    assert (full.value.status, full.value.code) == (429, "overloaded") and full.value.retry_after
    second = room.take(40)
    first(), first()
    assert room.taken == 40
    second()
    assert room.taken == 0
    with pytest.raises(Overloaded) as never:
        room.take(101)
    assert (never.value.status, never.value.code, never.value.retry_after) == (400, "too_much_work", None)
    assert room.taken == 0


def test_threads_never_take_more_than_there_is() -> None:
    room, most, taken = FrameRoom(10), list[int](), list[object]()

    def work() -> None:
        for _ in range(200):
            try:
                give_back = room.take(3)
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
