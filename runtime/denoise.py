"""The primitive of the denoising loop: `step(session, states) -> states`, for any number of requests at once."""

from __future__ import annotations

from collections.abc import Sequence

from ditc.runtime.batch import Batch
from ditc.runtime.session import LoopSession, Session
from ditc.runtime.state import DenoiseState
from ditc.runtime.step_contract import CARRY, STATS


def step(session: Session, states: Sequence[DenoiseState]) -> list[DenoiseState]:
    """Advance every state by one step in one run of the denoiser.

    The states may differ in prompt, guidance, schedule and step index, but their latents must have one size. To step
    the same requests repeatedly, keep a `Batch`: it stacks their text rows only once.

    Raises:
        ValueError: a state is already finished.
        UsageError: latents or text rows differ in size.
    """
    if len(states) > 1:
        return Batch(session).step(states)
    (state,) = states
    if state.done:
        raise ValueError("a finished state cannot be stepped")
    return [state.advanced(session.run(state.feeds()))]


def advance(session: Session, state: DenoiseState, count: int) -> DenoiseState:
    """Advance one request by up to `count` steps in one launch, or by one step if the session cannot run a loop.

    Raises:
        ValueError: the state is already finished.
    """
    count = min(count, _steps_with_equal_rows(state))
    if count <= 1 or not isinstance(session, LoopSession):
        return step(session, [state])[0]
    per_step = state.schedule[state.step_index : state.step_index + count]
    outputs = session.run_loop(state.constant_feeds(), per_step, carry=CARRY, keep=(STATS,))
    return state.advanced(outputs, count)


def _steps_with_equal_rows(state: DenoiseState) -> int:
    """How many steps from the next one on have the same number of rows, because a launch has one shape.

    It is 1 for inpainting, which changes the latents between two steps.
    """
    if state.kept is not None:
        return 1
    rows = [state.row_count(step) for step in range(state.step_index, len(state.schedule))]
    return next((i for i, count in enumerate(rows) if count != rows[0]), len(rows))
