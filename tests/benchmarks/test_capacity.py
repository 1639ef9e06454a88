"""The simulation of replicas agrees with queueing theory where that has a formula, and counts what it rejects."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.capacity_simulation import Arrival, Times, arrivals, simulate

# One second of work per request of 8 steps, and nothing else.
CONSTANT = Times(text=[0.1], step=[0.1], decode=[0.1], around=[0.0])


def steady(rate: float, count: int) -> list[Arrival]:
    return [Arrival(each.at, 8) for each in arrivals("poisson", rate, count / rate)]


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_replica_waits_as_the_formula_of_pollaczek_and_khinchine_says(load: float) -> None:
    """M/D/1: the mean wait is load * service / (2 * (1 - load)). 5,000 arrivals leave an error of some percent."""
    found = simulate(steady(load, 5_000), CONSTANT, 1, max_queue=10_000)
    assert found["mean_s"] == pytest.approx(1 + load / (2 * (1 - load)), rel=0.12)
    assert found["rejected"] == 0


def test_a_request_that_is_alone_takes_its_own_time() -> None:
    found = simulate([Arrival(5.0, 8)], CONSTANT, 3)
    assert (found["p50_s"], found["p99_s"], found["requests"]) == (pytest.approx(1.0), pytest.approx(1.0), 1)


def test_a_short_request_overtakes_a_longer_one_that_came_a_little_earlier() -> None:
    """As the policy of the server does: the short one is due 5 s after its arrival, the long one 30 s."""
    found = simulate([Arrival(0.0, 28), Arrival(0.05, 3)], CONSTANT, 1)
    assert found["p50_s"] < 1.0 and found["p99_s"] == pytest.approx(3.5)


def test_more_than_the_queue_holds_is_rejected() -> None:
    at_once = [Arrival(0.0, 8)] * 10
    assert simulate(at_once, CONSTANT, 1, max_queue=4)["rejected"] == pytest.approx(0.6)
    assert simulate(at_once, CONSTANT, 5, max_queue=2)["rejected"] == 0


def test_replicas_share_the_work() -> None:
    at_once = [Arrival(0.0, 8)] * 10
    assert simulate(at_once, CONSTANT, 10)["p99_s"] == pytest.approx(1.0)
    assert simulate(at_once, CONSTANT, 5)["p99_s"] == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["poisson", "bursts", "diurnal"])
def test_every_trace_has_the_rate_that_was_asked_for(kind: str) -> None:
    trace = arrivals(kind, 20.0, 400.0, seed=2)
    assert len(trace) == pytest.approx(8000, rel=0.05)
    assert all(a.at <= b.at for a, b in itertools.pairwise(trace))
    if kind == "bursts":
        assert sum(each.at % 20 < 5 for each in trace) / len(trace) == pytest.approx(0.75, abs=0.03)
