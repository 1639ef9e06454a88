"""Draws the pictures of a request part by part, from texts to pictures, and keeps nothing of a part that was taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING

from ditc.runtime.callback import Callback, StepCallback
from ditc.runtime.failure import Tally
from ditc.runtime.loop import Step, run_state
from ditc.runtime.output import Drawn

if TYPE_CHECKING:
    from ditc.runtime.pipeline import Pipeline
    from ditc.runtime.prepare import Plan


def draw_parts(
    pipeline: Pipeline, plan: Plan, on_step: Callable[[Step], None], function: StepCallback | None
) -> Iterator[Drawn]:
    """Draw as many pictures together as the denoiser's batch holds, until all are drawn.

    Args:
        on_step: observes each step.
        function: a callback in the form of diffusers.
    """
    clock, tally = _Clock(), Tally(plan.pictures, plan.request)
    pipeline.compile_ahead(plan)
    at_once = 1 if function else pipeline.steps_per_launch or len(plan.table)
    for chunk, state in enumerate(pipeline.states(plan)):
        clock.lap("text")
        callback = Callback(function, pipeline, plan, pipeline.drawable.contract) if function else None
        for step in run_state(
            pipeline.stepper,
            state,
            tally,
            chunk=chunk,
            done=chunk * len(plan.table),
            total=plan.runs,
            steps_per_launch=at_once,
            callback=callback,
        ):
            state = step.state
            on_step(step)
        clock.lap("denoise")
        first = tally.first
        decoded = pipeline.decode_state(state, plan, first)
        tally.add(decoded.failures, len(decoded.pictures))
        clock.lap("decode")
        failures = tuple(decoded.failures)
        yield Drawn(first=first, pictures=decoded.pictures, failures=failures, seconds=clock.laps)
        clock = _Clock()  # what the caller did with the part counts nowhere


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, name: str) -> None:
        now = perf_counter()
        self.laps[name] = now - self._last
        self._last = now
