"""The cache of conditioning rows."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ditc.runtime.cache import RowCache
from ditc.runtime.errors import NumericsError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import Array


def row(size_bytes: int, value: int = 0) -> dict[str, Array]:
    return {"kv": np.full(size_bytes, value, np.uint8)}


def test_a_value_is_computed_once() -> None:
    cache, calls = RowCache(100), []
    for _ in range(3):
        cache.get("a", lambda: calls.append(1) or row(10))  # type: ignore[func-returns-value]
    assert len(calls) == 1 and (cache.hits, cache.misses) == (2, 1)


def test_the_least_recently_used_row_leaves_first() -> None:
    cache = RowCache(100)
    for name in ("a", "b"):
        cache.get(name, lambda: row(40))
    cache.get("a", lambda: row(40))
    cache.get("c", lambda: row(40))
    assert cache.size_bytes == 80
    misses = cache.misses
    cache.get("a", lambda: row(40))
    assert cache.misses == misses
    cache.get("b", lambda: row(40))
    assert cache.misses == misses + 1


def test_a_row_larger_than_the_cache_is_returned_and_evicts_nothing() -> None:
    cache = RowCache(100)
    cache.get("a", lambda: row(60))
    assert cache.get("big", lambda: row(101))["kv"].nbytes == 101
    assert cache.size_bytes == 60


def test_a_failed_computation_is_not_remembered() -> None:
    cache = RowCache(100)

    def fail() -> dict[str, Array]:
        raise NumericsError("NaN")

    with pytest.raises(NumericsError):
        cache.get("a", fail)
    assert cache.get("a", lambda: row(1, 7))["kv"][0] == 7


def test_clearing_frees_everything() -> None:
    cache = RowCache(100)
    cache.get("a", lambda: row(60))
    cache.clear()
    assert cache.size_bytes == 0
    assert cache.get("a", lambda: row(1, 5))["kv"][0] == 5


def test_threads_that_miss_together_count_the_row_once() -> None:
    cache, barrier = RowCache(100), threading.Barrier(4)

    def compute() -> dict[str, Array]:
        barrier.wait(timeout=60)  # threads may start late on a busy machine
        return row(30)

    threads = [threading.Thread(target=cache.get, args=("a", compute)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert cache.size_bytes == 30


def test_a_text_is_encoded_once_for_any_number_of_requests(pipeline: Pipeline) -> None:
    cache = pipeline.conditioning.cache
    cache.clear()
    misses = cache.misses
    for seed in range(3):
        pipeline.start(pipeline.plan(Request(prompt="green dog", negative_prompt="red", seed=seed)))
    assert cache.misses - misses == 2
    pipeline.start(pipeline.plan(Request(prompt="  GREEN DOG ", negative_prompt="red", seed=0)))
    assert cache.misses - misses == 2, "the key is the token ids, not the text"


def test_a_text_has_one_row_as_prompt_and_another_as_negative_prompt(pipeline: Pipeline) -> None:
    cache = pipeline.conditioning.cache
    cache.clear()
    misses = cache.misses
    pipeline.start(pipeline.plan(Request(prompt="apple", negative_prompt="apple", seed=0)))
    assert cache.misses - misses == 2
