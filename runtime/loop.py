"""The denoising loop as a generator of steps, for states that are run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

from ditc.runtime import denoise
from ditc.runtime.failure import Tally
from ditc.runtime.guard import Guard
from ditc.runtime.session import Session
from ditc.runtime.spec import DENOISER
from ditc.runtime.state import DenoiseState
from ditc.runtime.step_contract import TIMESTEP


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is yielded after each step, or after the last step of each launch of several steps.

    Attributes:
        index, total: 0-based number of the step, and the number of steps of all chunks together.
        chunk: index of the state that was stepped. Pictures that do not fit into the denoiser's batch are drawn in
            chunks, one after the other.
        timestep: the step's timestep, as the network sees it.
        state: the state after the step.
        seconds: how long the launch took. On a GPU, this is only the time to submit the work.
    """

    index: int
    total: int
    chunk: int
    timestep: float
    state: DenoiseState
    seconds: float


def run_states(
    session: Session,
    states: Iterable[DenoiseState],
    tally: Tally,
    *,
    total: int,
    steps_per_launch: int = 1,
) -> Iterator[Step]:
    """Run states to their ends. The arguments are those of `run_state`."""
    done = 0
    for chunk, state in enumerate(states):
        ahead, at_once = len(state.schedule) - state.step_index, steps_per_launch
        for step in run_state(
            session, state, tally, chunk=chunk, done=done, total=total, steps_per_launch=at_once
        ):
            state = step.state
            yield step
        tally.add_state(state)
        done += ahead


def run_state(
    session: Session,
    state: DenoiseState,
    tally: Tally,
    *,
    chunk: int,
    done: int,
    total: int,
    steps_per_launch: int,
    callback: Callable[[DenoiseState, float], DenoiseState] | None = None,
) -> Iterator[Step]:
    """Run a state to its end, or until all of its pictures have failed.

    Args:
        session: the denoiser.
        tally: checks the failures of every step.
        chunk, total: as in `Step`.
        done: the number of steps before this state's first one.
        callback: returns the state from which the loop goes on.
    """
    guard, begin = Guard(DENOISER), state.step_index
    while not state.done and not state.lost:
        before = perf_counter()
        state = guard.watch(denoise.advance(session, state, steps_per_launch))
        tally.check(state)
        seconds = perf_counter() - before
        timestep = float(state.schedule[state.step_index - 1][TIMESTEP][0])
        if callback is not None:
            state = callback(state, timestep)
            state = guard.watch(state) if state.done else state  # a callback may have ended the loop
        index = done + state.step_index - begin - 1
        yield Step(index=index, total=total, chunk=chunk, timestep=timestep, state=state, seconds=seconds)
