"""A batch of requests: what is copied when its members change, and what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from ditc.runtime import batch as module
from ditc.runtime.batch import Batch
from ditc.runtime.errors import UsageError
from ditc.runtime.row_stack import RowStack
from ditc.runtime.session import Array, Tensor, to_numpy
from ditc.runtime.spec import DENOISER, Range, StageSpec
from ditc.runtime.state import DenoiseState, Rows
from ditc.runtime.step_contract import (
    GUIDANCE_WEIGHTS,
    HISTORY,
    LATENTS,
    NEXT_HISTORY,
    NEXT_LATENTS,
    ROW_OF,
    ROWS,
    STATS,
    TIMESTEP,
    X0,
)


class Echo:
    """A denoiser whose x0 is the guided mean of its rows' text, so that a row in the wrong place changes it."""

    spec = StageSpec(DENOISER, (), (), {ROWS: Range(1, 2, 16)})

    def __init__(self) -> None:
        self.feeds: list[dict[str, Array]] = []

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        host = {name: np.array(to_numpy(tensor)) for name, tensor in feeds.items()}
        self.feeds.append(host)
        weights, text, latents = host[GUIDANCE_WEIGHTS], host["text"], host[LATENTS]
        assert weights.shape == (len(latents), len(text))
        belongs = host[ROW_OF][None] == np.arange(len(latents))[:, None]
        assert not weights[~belongs].any(), "a row has a weight for another sample than its own"
        guided = (weights @ text)[:, :1, None, None]
        return {
            NEXT_LATENTS: latents + guided,
            X0: np.broadcast_to(guided, latents.shape).copy(),
            NEXT_HISTORY: latents[:, None],
            STATS: np.zeros((len(latents), 2), np.float32),
        }

    def close(self) -> None:
        pass


def state(
    value: float, *, samples: int = 1, rows: int = 2, side: int = 4, steps: int = 8, tokens: int = 3
) -> DenoiseState:
    """A request whose text rows hold one value, with weights that add up to 1."""
    weights = np.concatenate([np.eye(samples, dtype=np.float32) / rows] * rows, axis=1)
    feeds = {TIMESTEP: np.full(samples, value, np.float32), GUIDANCE_WEIGHTS: weights}
    latents = np.full((samples, 2, side, side), 100 * value, np.float32)
    return DenoiseState(
        latents=latents,
        history=latents[:, None] * 0,
        schedule=(feeds,) * steps,
        rows=Rows(
            np.tile(np.arange(samples), rows), {"text": np.full((samples * rows, tokens), value, np.float32)}
        ),
    )


def value_of(state: DenoiseState) -> float:
    return float(to_numpy(state.x0)[0, 0, 0, 0])  # type: ignore[arg-type]


def test_rows_of_several_requests_point_at_their_own_samples() -> None:
    session = Echo()
    states = [state(1.0, samples=2), state(2.0, rows=1), state(3.0)]
    after = Batch(session).step(states)
    assert session.feeds[0][ROW_OF].tolist() == [0, 1, 0, 1, 2, 3, 3]
    assert session.feeds[0]["text"][:, 0].tolist() == [1, 1, 1, 1, 2, 3, 3]
    assert [value_of(one) for one in after] == [1, 2, 3]


def test_requests_join_leave_and_change_places_and_each_gets_its_own_result() -> None:
    """Members, sizes and orders are random. The session checks that no row has a weight for another request."""
    rng = np.random.default_rng(0)
    batch, waiting = Batch(Echo()), 0
    members: dict[float, DenoiseState] = {}
    for _ in range(200):
        for value in [v for v in members if rng.random() < 0.3]:
            del members[value]
        while len(members) < 1 or (len(members) < 5 and rng.random() < 0.5):
            waiting += 1
            members[float(waiting)] = state(
                float(waiting), samples=int(rng.integers(1, 3)), rows=int(rng.integers(1, 4)), steps=1000
            )
        order = list(members)
        rng.shuffle(order)
        for value, after in zip(order, batch.step([members[v] for v in order]), strict=True):
            assert value_of(after) == pytest.approx(value, rel=1e-6)
            expected = 100 * value + value * after.step_index
            np.testing.assert_allclose(to_numpy(after.latents), expected, rtol=1e-5)
            members[value] = after


def test_only_the_rows_of_requests_that_joined_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[float] = []

    def assign(target: Tensor, start: int, source: Tensor) -> None:
        copied.extend(to_numpy(source)[:, 0].tolist())
        to_numpy(target)[start : start + len(to_numpy(source))] = to_numpy(source)

    monkeypatch.setattr("ditc.runtime.row_stack.assign", assign)
    stack, requests = RowStack(Echo()), [state(float(i)).rows for i in range(8)]
    stack.place(requests[:4])
    copied.clear()
    stack.place(requests[:4])
    stack.place(requests[3::-1])
    assert copied == [], "the same members in another order need no copy"
    stack.place([*requests[:2], requests[3]])
    assert copied == [3, 3], "the last member closes the gap"
    copied.clear()
    stack.place([requests[0], requests[4], requests[3]])
    assert copied == [4, 4], "the new member takes the place of the one that left"
    copied.clear()
    starts = stack.place([requests[0], requests[4], requests[3], requests[5]])
    assert copied == [5, 5], "the new member is written after the last one"
    text = to_numpy(stack.tensors["text"])
    assert [text[start, 0] for start in starts] == [0, 4, 3, 5]


def test_a_stack_holds_no_rows_of_requests_that_left() -> None:
    batch, first, second = Batch(Echo()), state(1.0), state(2.0)
    gone = weakref.ref(first.rows)
    batch.step([first, second])
    del first
    batch.step([second])
    gc.collect()
    assert gone() is None


def test_texts_of_another_length_get_no_more_memory_than_they_need() -> None:
    """Room for further requests is made only when requests stay: a new length starts anew."""
    stack = RowStack(Echo())
    for tokens in (3, 5, 3, 5):
        stack.place([state(1.0, tokens=tokens).rows])
        (buffer,) = stack._buffers.values()
        assert buffer.shape == (2, tokens)


def test_rows_that_nobody_needs_are_freed_before_others_get_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, held = RowStack(Echo()), []
    stack.place([state(1.0).rows])
    old = weakref.ref(stack._buffers["text"])

    def empty_like(tensor: Tensor, length: int, *_: object) -> Tensor:
        held.append(old() is not None)
        return np.empty((length, *tensor.shape[1:]), np.float32)

    monkeypatch.setattr("ditc.runtime.row_stack.empty_like", empty_like)
    stack.place([state(1.0, tokens=5).rows])
    assert held == [False]


def test_rows_are_freed_with_their_batch() -> None:
    batch, only = Batch(Echo()), state(1.0)
    gone = weakref.ref(only.rows)
    batch.step([only, state(2.0)])
    del batch, only
    gc.collect()
    assert gone() is None


def test_requests_of_different_latent_sizes_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"request 0 has latents of \(2, 4, 4\), request 1 of \(2, 8, 8\)"):
        Batch(Echo()).step([state(1.0), state(2.0, side=8)])


def test_texts_of_different_lengths_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"text differ in size .* request 1 \(5,\)"):
        Batch(Echo()).step([state(1.0), state(2.0, tokens=5)])


def test_a_batch_that_refused_its_members_still_works_with_others() -> None:
    batch, good = Batch(Echo()), [state(1.0), state(2.0)]
    batch.step(good)
    with pytest.raises(UsageError):
        batch.step([*good, state(3.0, tokens=5)])
    assert [value_of(one) for one in batch.step([*good, state(4.0)])] == [1, 2, 4]


def test_one_request_cannot_be_in_a_batch_twice() -> None:
    one = state(1.0)
    with pytest.raises(UsageError, match="twice"):
        Batch(Echo()).step([one, one])


def test_rows_that_only_some_steps_use_are_added_and_removed() -> None:
    """Skip-layer guidance has a third row only in some steps."""
    third, two = state(3.0, rows=3), state(3.0, rows=2)
    changing = replace(third, schedule=(two.schedule[0], third.schedule[0], two.schedule[0]))
    batch, other = Batch(Echo()), state(1.0)
    for _ in range(3):
        changing, other = batch.step([changing, other])
        assert value_of(changing) == pytest.approx(3.0) and value_of(other) == 1.0


def test_requests_that_were_adjacent_in_the_last_step_are_not_copied() -> None:
    session, seen = Echo(), []
    real = session.run

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append(feeds)
        return real(feeds)

    session.run = run  # type: ignore[method-assign]
    for members, copied in (
        ((0, 1, 2), False),
        ((1, 2), False),
        ((1,), False),
        ((2, 1), True),
        ((0, 2), True),
    ):
        batch = Batch(session)
        states = batch.step([state(1.0), state(2.0, samples=2), state(3.0)])
        batch.step([states[i] for i in members])
        shared = np.shares_memory(to_numpy(seen[-1][LATENTS]), to_numpy(states[members[0]].latents))
        assert shared is not copied, members
        wanted = np.concatenate([to_numpy(states[i].latents) for i in members])
        np.testing.assert_array_equal(to_numpy(seen[-1][LATENTS]), wanted)


def test_latents_that_were_replaced_from_outside_are_used() -> None:
    session = Echo()
    batch = Batch(session)
    one, two = batch.step([state(1.0), state(2.0)])
    batch.step([replace(one, latents=to_numpy(one.latents) + 7), two])
    assert session.feeds[-1][LATENTS][:, 0, 0, 0].tolist() == [101 + 7, 202]


def test_a_batch_whose_members_stay_copies_no_latents_and_no_history() -> None:
    session, seen = Echo(), []
    real = session.run

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append(feeds)
        return real(feeds)

    session.run = run  # type: ignore[method-assign]
    batch, states = Batch(session), [state(1.0), state(2.0, samples=2), state(3.0)]
    for _ in range(3):
        before, states = states, batch.step(states)
        if len(seen) > 1:
            assert np.shares_memory(to_numpy(seen[-1][LATENTS]), to_numpy(before[0].latents))
            assert np.shares_memory(to_numpy(seen[-1][HISTORY]), to_numpy(before[2].history))
            assert seen[-1][ROW_OF] is seen[-2][ROW_OF], "a device must be sent it only once"
            assert seen[-1]["text"] is seen[-2]["text"]


def test_the_module_keeps_nothing_for_the_whole_process() -> None:
    kept = [name for name, value in vars(module).items() if hasattr(value, "cache_info")]
    assert kept == []
