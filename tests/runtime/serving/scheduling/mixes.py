"""Random mixes of requests through one scheduler, and what each picture is when it is drawn alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.scheduling.job import Cancelled, Event, Finished, Job, Picture
from ditc.runtime.serving.scheduling.scheduler import Scheduler
from ditc.runtime.session import Array, to_numpy

PROMPTS = ("red cat", "blue dog", "apple", "green tree")


@dataclass(frozen=True, kw_only=True)
class Alone:
    """A request, and its latents and pictures when nothing else is drawn."""

    request: Request
    latents: Array
    pictures: tuple[Array, ...]


@dataclass
class Entry:
    """A request in a mix: after how many actions of the scheduler it is submitted, and cancelled if it is."""

    alone: Alone
    joins: int
    cancelled_at: int | None
    job: Job | None = None
    events: list[Event] = field(default_factory=list)


def variants(rng: random.Random, count: int, sides: Sequence[int], **options: Sequence[Any]) -> list[Request]:
    """Requests that differ in prompt, seed, steps, size, guidance and number of pictures.

    Args:
        options: further arguments, with the values to choose from.
    """
    return [
        Request(
            prompt=PROMPTS[number % len(PROMPTS)],
            negative_prompt=rng.choice(["", "dog"]),
            seed=number,
            num_inference_steps=rng.randint(1, 4),
            guidance_scale=rng.choice([1.0, 2.0, 4.5]),
            height=rng.choice(sides),
            width=rng.choice(sides),
            num_images_per_prompt=rng.choice([1, 1, 1, 2]),
            output_type="pil",
            allow_uniform=True,
            **{name: rng.choice(values) for name, values in options.items()},
        )
        for number in range(count)
    ]


def drawn_alone(pipeline: Pipeline, request: Request) -> Alone:
    """What the pipeline draws for the whole request at once."""
    plan = pipeline.plan(request)
    last = [step.state for step in pipeline.run(pipeline.start(plan))][-1]
    decoded = pipeline.decode_state(last, plan)
    assert not decoded.failures
    return Alone(
        request=request,
        latents=to_numpy(last.latents),
        pictures=tuple(np.asarray(picture) for picture in decoded.pictures),
    )


class Mixer:
    """A scheduler whose actions the caller does one by one, with batches forced."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.latents: dict[str, dict[int, Array]] = {}  # by the id of a job, then by picture
        self.sizes: list[int] = []  # of each run of the denoiser
        self.scheduler = Scheduler(
            self.pipeline, admission=Admission(Bounds(requests=100)), reopen=lambda: pipeline
        )
        force_batches(self.scheduler)
        self._ids = map(str, itertools.count())
        decode, step = self.scheduler._work.decode, self.scheduler._work.batches.step

        def decode_and_keep(picture: Picture) -> None:
            self.latents.setdefault(picture.job.id, {})[picture.index] = to_numpy(picture.state.latents)
            decode(picture)

        def step_and_count(key: Any, states: Any) -> Any:
            self.sizes.append(len(states))
            return step(key, states)

        self.scheduler._work.decode = decode_and_keep  # type: ignore[method-assign]
        self.scheduler._work.batches.step = step_and_count  # type: ignore[method-assign]

    def mix(self, rng: random.Random, known: Sequence[Alone]) -> list[Entry]:
        """Draw some requests together. They join, and some are cancelled, at random times."""
        entries = [
            Entry(rng.choice(known), rng.randrange(10), rng.randrange(1, 20) if rng.random() < 0.15 else None)
            for _ in range(rng.randint(2, 4))
        ]
        for turn in itertools.count():
            for entry in entries:
                if turn == entry.joins:
                    plan = self.pipeline.plan(entry.alone.request)
                    entry.job = self.scheduler.submit(plan, entry.events.append, id=next(self._ids))
                if entry.job is not None and turn == entry.cancelled_at:
                    self.scheduler.cancel(entry.job)
            with self.scheduler._wake:
                action, _ = self.scheduler._next()
            if action is not None:
                self.scheduler._do(action)
            elif turn > 10:
                break
        return entries


def force_batches(scheduler: Scheduler) -> None:
    """Let the policy take as many pictures as fit."""
    scheduler.times.best_size = lambda key, most: min(most, scheduler.max_batch)  # type: ignore[method-assign]


def ends(entries: Sequence[Entry]) -> list[tuple[Entry, Finished]]:
    """The entries that were drawn, after a check that each had one end, and only cancelled ones have no picture."""
    drawn = []
    for entry in entries:
        finished = [event for event in entry.events if isinstance(event, Finished)]
        cancelled = [event for event in entry.events if isinstance(event, Cancelled)]
        assert len(finished) + len(cancelled) == 1, entry.events
        assert finished or entry.cancelled_at is not None
        drawn += [(entry, end) for end in finished]
    return drawn
