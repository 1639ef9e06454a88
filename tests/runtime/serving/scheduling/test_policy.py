"""Which pictures run next: order, batches, turns of sizes, and the bound on how long a picture waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.runtime.serving.scheduling.policy import STRETCH, BatchKey, Choice, Waiting, choose, due_time

SMALL = BatchKey(latents=(4, 8, 8), rows=2)
LARGE = BatchKey(latents=(4, 16, 8), rows=2)
KEYS = (SMALL, LARGE)

# The same examples in every run, and no limit on their time: other work on the machine must not fail a test.
examples = settings(derandomize=True, deadline=None, max_examples=200)


def waiting(id: int, due: float, key: BatchKey = SMALL, *, since: float = 0, started: bool = True) -> Waiting:
    return Waiting(id=id, key=key, due=due, since=since, started=started)


def all_fit(key: BatchKey, most: int) -> int:
    return min(most, 4)


def one(key: BatchKey, most: int) -> int:
    return 1


def test_nothing_is_chosen_of_nothing() -> None:
    assert choose([], 0, one) == Choice()


def test_the_picture_that_is_due_first_goes_first_and_those_of_its_size_join_it_in_order() -> None:
    queue = [waiting(1, 5), waiting(2, 3), waiting(3, 4, LARGE), waiting(4, 9), waiting(5, 8)]
    assert choose(queue, 0, all_fit).ids == (2, 1, 5, 4)
    assert choose(queue, 0, one).ids == (2,)


def test_equal_due_times_keep_the_order_of_arrival() -> None:
    assert choose([waiting(2, 1), waiting(1, 1), waiting(3, 1)], 0, all_fit).ids == (1, 2, 3)


def test_the_first_step_waits_for_company_only_while_nothing_runs_and_the_batch_has_room() -> None:
    new = waiting(1, 5, since=10, started=False)
    assert choose([new], 10.01, all_fit, window=0.05) == Choice(wait_until=10.05)
    assert choose([new], 10.05, all_fit, window=0.05).ids == (1,)
    assert choose([new], 10.01, one, window=0.05).ids == (1,), "company would not make it faster"
    assert choose([new, waiting(2, 1)], 10.01, all_fit, window=0.05).ids == (2, 1)
    full = [waiting(i, 5, since=10, started=False) for i in range(4)]
    assert choose(full, 10.01, all_fit, window=0.05).ids == (0, 1, 2, 3)


def test_a_deadline_makes_a_picture_due_earlier_but_never_later() -> None:
    assert due_time(100, 2, None) == 100 + 2 * STRETCH
    assert due_time(100, 2, 105) == 105
    assert due_time(100, 2, 1000) == 100 + 2 * STRETCH


@dataclass
class Work:
    """A request of the simulation: one picture whose steps take one second each, whatever the batch."""

    arrived: float
    steps: int
    key: BatchKey
    left: int = 0
    done: float = 0

    def __post_init__(self) -> None:
        self.left = self.steps
        self.due = due_time(self.arrived, self.steps, None)


def simulate(works: Sequence[Work], largest: int) -> list[tuple[int, ...]]:
    """Run the policy until all is done, one second a step; returns what ran."""
    now, ran = 0.0, []
    while any(work.left for work in works):
        here = [i for i, work in enumerate(works) if work.left and work.arrived <= now]
        if not here:
            now = min(work.arrived for work in works if work.left)
            continue
        queue = [waiting(i, works[i].due, works[i].key) for i in here]
        chosen = choose(queue, now, lambda key, most: min(most, largest)).ids
        assert chosen and set(chosen) <= set(here)
        assert len({works[i].key for i in chosen}) == 1 and len(chosen) <= largest
        ran.append(chosen)
        now += 1
        for i in chosen:
            works[i].left -= 1
            works[i].done = now
    return ran


requests = st.lists(
    st.builds(Work, st.integers(0, 60).map(float), st.integers(1, 20), st.sampled_from(KEYS)),
    min_size=1,
    max_size=25,
)


@examples
@given(requests, st.integers(1, 4))
def test_nothing_starves_and_every_wait_is_bounded(works: list[Work], largest: int) -> None:
    """What arrives after a picture's due time never delays it, so it waits at most for what was there then."""
    simulate(works, largest)
    for work in works:
        there = sum(other.steps for other in works if other.arrived <= work.due and other.due <= work.due)
        assert work.done <= max(work.due, work.arrived) + there + 1


@examples
@given(requests)
def test_the_device_never_idles_while_something_waits(works: list[Work]) -> None:
    """Without batches, all work is done as early as in any other order."""
    ran = simulate(works, 1)
    assert len(ran) == sum(work.steps for work in works)
    end = 0.0
    for work in sorted(works, key=lambda work: work.arrived):
        end = max(end, work.arrived) + work.steps
    assert max(work.done for work in works) == pytest.approx(end)


@examples
@given(st.integers(1, 12), st.integers(1, 10), st.integers(1, 4))
def test_sizes_take_turns(count: int, steps: int, largest: int) -> None:
    """Of two sizes with equal requests that come in turns, none gets ahead by more than one batch of requests."""
    works = [Work(arrived=0, steps=steps, key=KEYS[i % 2]) for i in range(2 * count)]
    served = dict.fromkeys(KEYS, 0)
    finished = dict.fromkeys(KEYS, 0)
    left = [steps] * len(works)
    for chosen in simulate(works, largest):
        for i in chosen:
            served[works[i].key] += 1
            left[i] -= 1
            finished[works[i].key] += left[i] == 0
        assert abs(finished[SMALL] - finished[LARGE]) <= largest
    assert served[SMALL] == served[LARGE]


@examples
@given(st.integers(1, 10), st.integers(1, 6))
def test_few_steps_overtake_many_that_came_a_little_earlier(long: int, short: int) -> None:
    works = [Work(0, 50, SMALL) for _ in range(long)] + [Work(1, 4, SMALL) for _ in range(short)]
    simulate(works, 1)
    assert max(work.done for work in works[long:]) <= 1 + 4 * short + 1


@examples
@given(st.lists(st.floats(0, 100), min_size=2, max_size=20))
def test_deadlines_that_come_first_go_first(dues: list[float]) -> None:
    queue = [waiting(i, due) for i, due in enumerate(dues)]
    order = []
    while queue:
        (first,) = choose(queue, 0, one).ids
        order.append(dues[first])
        queue = [other for other in queue if other.id != first]
    assert order == sorted(dues)
