"""What a key may use is counted exactly."""

from __future__ import annotations

import threading

import pytest

from ditc.runtime.serving.http.callers import Caller
from ditc.runtime.serving.http.keys import KeyLimits
from ditc.runtime.serving.refusals import Overloaded, TooLate


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusal(caller: Caller, work: int | None = None) -> Overloaded:
    with pytest.raises(Overloaded) as caught, caller.request() if work is None else caller.drawing(work):
        pass
    return caught.value


def test_requests_per_minute_refill_evenly() -> None:
    clock = Clock()
    caller = Caller("a", limits=KeyLimits(requests_per_minute=6), clock=clock)
    for _ in range(6):
        with caller.request():
            pass
    assert refusal(caller).retry_after == pytest.approx(10)
    clock.now += 4
    assert refusal(caller).retry_after == pytest.approx(6)
    clock.now += 6.001
    with caller.request():
        pass
    assert refusal(caller).status == 429
    clock.now += 3600  # no more than a minute's worth is saved up
    for _ in range(6):
        with caller.request():
            pass
    refusal(caller)


def test_only_so_many_requests_are_answered_at_a_time() -> None:
    caller = Caller("a", limits=KeyLimits(concurrent_requests=2))
    with caller.request(), caller.request():
        assert refusal(caller).code == "too_many_concurrent_requests"
        with caller.drawing(10):  # drawings are counted by themselves: a job goes on without a request
            pass
    with caller.request():
        pass


def test_work_counts_unless_it_is_refused() -> None:
    clock = Clock()
    caller = Caller("a", limits=KeyLimits(pixel_steps_per_minute=600), clock=clock)
    with pytest.raises(TooLate), caller.drawing(600):
        raise TooLate("no")
    with caller.drawing(500):
        pass
    assert refusal(caller, 200).retry_after == pytest.approx(10)
    too_much = refusal(caller, 601)
    assert (too_much.status, too_much.retry_after) == (400, None)


def test_a_caller_without_limits_is_never_refused() -> None:
    caller = Caller("a")
    for _ in range(10_000):
        with caller.request(), caller.drawing(2**40):
            pass


def test_threads_share_a_caller() -> None:
    caller = Caller("a", limits=KeyLimits(requests_per_minute=1000))
    refused = []

    def use() -> None:
        for _ in range(400):
            try:
                with caller.request():
                    pass
            except Overloaded:
                refused.append(1)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 590 <= len(refused) <= 600  # some come back while the test runs
