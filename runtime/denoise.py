"""The denoising loop's primitive: `step(session, states) -> states`, over any number of requests at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ditc.runtime.batch import Batch
from ditc.runtime.session import Array, LoopSession, Session
from ditc.runtime.state import DenoiseState
from ditc.runtime.step_contract import CARRY, NOISE, STATS


def step(session: Session, states: Sequence[DenoiseState]) -> list[DenoiseState]:
    """Advance every state by one step in one run of the denoiser.

    The states may differ in prompt, guidance, schedule and step index; their latents agree in size. Whoever steps the
    same requests again and again keeps a `Batch`, which stacks their text rows once.

    Raises:
        ValueError: a state is done already. UsageError: latents or text rows that differ in size.
    """
    if len(states) > 1:
        return Batch(session).step(states)
    (state,) = states
    if state.done:
        raise ValueError("a finished state cannot be stepped")
    feeds = state.feeds()
    if any(spec.name == NOISE for spec in session.spec.inputs):
        feeds[NOISE] = state.draw_noise()
    return [state.advanced(session.run(feeds))]


def advance(session: Session, state: DenoiseState, count: int) -> DenoiseState:
    """Up to `count` steps of one request: in one launch where the session can, else one step.

    Raises:
        ValueError: the state is done already.
    """
    count = min(count, _steps_alike(state))
    if count <= 1 or not isinstance(session, LoopSession):
        return step(session, [state])[0]
    per_step: list[Mapping[str, Array]] = list(state.schedule[state.step_index : state.step_index + count])
    if any(spec.name == NOISE for spec in session.spec.inputs):
        per_step = [{**feeds, NOISE: state.draw_noise()} for feeds in per_step]
    outputs = session.run_loop(state.constant_feeds(), per_step, carry=CARRY, keep=(STATS,))
    return state.advanced(outputs, count)


def _steps_alike(state: DenoiseState) -> int:
    """How many of the next steps have as many rows as the next one: a launch has one shape."""
    rows = [state.row_count(step) for step in range(state.step_index, len(state.schedule))]
    return next((i for i, count in enumerate(rows) if count != rows[0]), len(rows))
