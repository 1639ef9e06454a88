"""Exact counts: never more than the bounds say, whatever threads do, and a time to come back."""

from __future__ import annotations

import threading
from random import Random

import pytest

from ditc.runtime.errors import UsageError
from ditc.runtime.serving.refusals import Overloaded
from ditc.runtime.serving.scheduling.admission import LONGEST_RETRY, SHORTEST_RETRY, Admission, Bounds


def test_a_full_queue_refuses_with_the_time_that_one_request_takes() -> None:
    admission = Admission(Bounds(requests=2, pixel_steps=1000))
    admission.take(10, seconds_of_all=0)
    admission.take(10, seconds_of_all=8)
    with pytest.raises(Overloaded, match="queue is full: 2 requests") as refusal:
        admission.take(10, seconds_of_all=16)
    assert (refusal.value.status, refusal.value.retry_after) == (429, 8)
    admission.give_back(10)
    admission.take(10, seconds_of_all=8)


def test_too_much_work_waits_for_as_much_as_is_missing() -> None:
    admission = Admission(Bounds(requests=9, pixel_steps=100))
    admission.take(80, seconds_of_all=0)
    with pytest.raises(Overloaded, match="80 of at most 100 pixel-steps") as refusal:
        admission.take(40, seconds_of_all=40)
    assert (refusal.value.status, refusal.value.retry_after) == (429, 10)
    admission.take(20, seconds_of_all=40)


def test_a_request_that_never_fits_is_wrong_and_need_not_come_back() -> None:
    with pytest.raises(Overloaded, match="at most 100") as refusal:
        Admission(Bounds(pixel_steps=100)).take(101, seconds_of_all=0)
    assert (refusal.value.status, refusal.value.retry_after) == (400, None)


@pytest.mark.parametrize(("seconds", "retry"), [(0.0, SHORTEST_RETRY), (1e9, LONGEST_RETRY)])
def test_the_time_to_come_back_is_bounded(seconds: float, retry: float) -> None:
    admission = Admission(Bounds(requests=1))
    admission.take(1, seconds_of_all=0)
    with pytest.raises(Overloaded) as refusal:
        admission.take(1, seconds_of_all=seconds)
    assert refusal.value.retry_after == retry


def test_threads_never_exceed_the_bounds_and_leave_nothing() -> None:
    admission, highest, refused = Admission(Bounds(requests=5, pixel_steps=40)), [], []

    def client(seed: int) -> None:
        random = Random(seed)
        for _ in range(300):
            work = random.randint(1, 12)
            try:
                admission.take(work, seconds_of_all=1)
            except Overloaded:
                refused.append(work)
                continue
            highest.append((admission.requests, admission.pixel_steps))
            admission.give_back(work)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (admission.requests, admission.pixel_steps) == (0, 0)
    assert max(requests for requests, _ in highest) <= 5
    assert max(work for _, work in highest) <= 40
    assert len(highest) + len(refused) == 8 * 300


@pytest.mark.parametrize("name", ["requests", "pixel_steps"])
def test_bounds_are_positive(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        Bounds(**{name: 0})
