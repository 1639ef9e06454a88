"""Times that were measured, times that are estimated from them, and the batch that follows."""

from __future__ import annotations

import pytest

from ditc.runtime.serving.scheduling.policy import BatchKey
from ditc.runtime.serving.scheduling.step_times import MAX_KEYS, NEWEST, StepTimes

KEY = BatchKey(latents=(4, 8, 8), rows=2)
DOUBLE = BatchKey(latents=(4, 16, 8), rows=2)
UNGUIDED = BatchKey(latents=(4, 8, 8), rows=1)


def times(measured: dict[int, float], **settings: object) -> StepTimes:
    made = StepTimes(**{"max_batch": 8, **settings})  # type: ignore[arg-type]
    for size, seconds in measured.items():
        made.record(KEY, size, seconds)
    return made


def test_without_measurements_nothing_is_claimed_and_no_batch_is_made() -> None:
    assert times({}).seconds(KEY) == 0
    assert times({}).best_size(KEY, 8) == 1


def test_a_batch_is_made_where_it_is_faster_per_picture() -> None:
    assert times({1: 1.0, 2: 1.2, 4: 1.6, 8: 3.3}).best_size(KEY, 8) == 4
    assert times({1: 1.0, 2: 1.2, 4: 1.6, 8: 3.3}).best_size(KEY, 2) == 2
    assert times({1: 1.0, 2: 1.99, 4: 3.98, 8: 8.0}).best_size(KEY, 8) == 1


def test_the_bound_of_the_batch_holds() -> None:
    assert times({1: 1.0, 2: 1.0, 4: 1.0}, max_batch=3).best_size(KEY, 8) == 3


def test_new_measurements_count_more_and_more() -> None:
    made = times({1: 1.0})
    made.record(KEY, 1, 2.0)
    assert made.seconds(KEY) == pytest.approx(1 + NEWEST)
    for _ in range(60):
        made.record(KEY, 1, 2.0)
    assert made.seconds(KEY) == pytest.approx(2, abs=1e-4)


def test_other_sizes_and_guidance_are_estimated_by_their_work() -> None:
    made = times({1: 1.0, 2: 1.2})
    assert made.seconds(DOUBLE) == pytest.approx(2)
    assert made.seconds(UNGUIDED) == pytest.approx(0.5)
    assert made.best_size(DOUBLE, 2) == 2, "batches pay as they do for the size that was measured"
    made.record(DOUBLE, 1, 3.0)
    assert made.seconds(DOUBLE, 2) == pytest.approx(3.6)


def test_batches_between_two_measurements_lie_between_them() -> None:
    made = times({1: 1.0, 2: 2.0, 4: 3.0})
    assert made.seconds(KEY, 3) == pytest.approx(2.5)
    assert made.seconds(KEY, 8) == pytest.approx(6)


def test_a_padded_batch_takes_the_time_of_its_bucket() -> None:
    made = times({1: 1.0, 2: 1.1, 4: 1.2}, buckets=(1, 2, 4), max_batch=4)
    assert made.seconds(KEY, 3) == pytest.approx(1.2)
    made.record(KEY, 3, 1.2)
    assert made.measured()[KEY].keys() == {1, 2, 4}


def test_any_number_of_sizes_takes_bounded_memory_and_the_best_known_size_stays() -> None:
    made = times({1: 1.0, 2: 1.2})
    for side in range(1, 3 * MAX_KEYS):
        key = BatchKey(latents=(4, 8, side), rows=2)
        made.seconds(BatchKey(latents=(4, 9, side), rows=2))
        made.record(key, 1, side / 8)
        assert made.seconds(BatchKey(latents=(4, 16, side), rows=2)) >= side / 8, "estimated from the nearest"
    assert len(made.measured()) == MAX_KEYS and len(made._nearest) <= MAX_KEYS
    assert made.measured()[KEY].keys() == {1, 2}


def test_stages_are_estimated_per_unit_of_size() -> None:
    made = times({})
    assert made.stage_seconds("vae_decoder", 100) == 0
    made.record_stage("vae_decoder", 100, 1.0)
    assert made.stage_seconds("vae_decoder", 400) == pytest.approx(4)
