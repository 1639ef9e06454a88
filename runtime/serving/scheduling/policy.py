"""Which pictures run in the next step: a pure function of those that wait, the time and the measured step times.

Every picture gets a due time when it is accepted: its arrival plus STRETCH times the time that it takes alone, or the
client's deadline if that is earlier. The picture that is due first decides which latent size runs. Those of the same
size join it in the order of their due times, as long as a larger batch is faster per picture.

A few-step picture is therefore drawn before one of many steps that came a little earlier, and no picture starves: what
arrives after a picture's due time is due later, so it never goes before it. Deadlines that are proportional to the time
that a job takes alone keep the largest slowdown small (Bender, Chakrabarti and Muthukrishnan, "Flow and Stretch Metrics
for Scheduling Continuous Job Streams", SODA 1998).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# How many times as long as alone a picture may take before it goes before all that arrive. With a larger value,
# short requests overtake longer queues, and long requests wait longer for them.
STRETCH = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchKey:
    """Pictures with equal keys can share a run of the denoiser.

    Attributes:
        latents: (C, H, W), the size of one picture's latents, or (C, F, H, W) of a video's.
        rows: the number of network rows of one picture: 1 without guidance, 2 with, 3 with a gated row as well.
        texts: names and sizes of the conditioning of one row, without those that may differ within a batch.
        controlled: whether a ControlNet runs. A batch with one such picture would run it for all of its pictures.
        variant: the LoRA that is an input of the run; "" for none.
    """

    latents: tuple[int, ...]
    rows: int
    texts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    controlled: bool = False
    variant: str = ""

    @property
    def weight(self) -> int:
        """What a step of one picture costs, in latent cells times rows. Times of other sizes are estimated with it."""
        cells = 1
        for size in self.latents[1:]:
            cells *= size
        return cells * self.rows

    @property
    def timed(self) -> BatchKey:
        """The key under which times are kept: a LoRA's small matrices change them little."""
        return replace(self, variant="") if self.variant else self


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One picture between two steps.

    Attributes:
        id: identifies it in the choice.
        key: with which others it can share a run.
        due: seconds on the clock of `now`; earlier goes first.
        since: when it became ready for its first step.
        started: whether it has done a step.
    """

    id: int
    key: BatchKey
    due: float
    since: float
    started: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """Which pictures to step now; if none, the time until which to wait for more."""

    ids: tuple[int, ...] = ()
    wait_until: float | None = None


def due_time(arrived: float, alone_seconds: float, deadline: float | None) -> float:
    """When a picture should be done, in seconds on the clock of `arrived`.

    Args:
        alone_seconds: how long it takes if nothing else runs.
        deadline: the client's own, if there is one.
    """
    due = arrived + STRETCH * alone_seconds
    return due if deadline is None else min(due, deadline)


def choose(
    waiting: Sequence[Waiting],
    now: float,
    best_size: Callable[[BatchKey, int], int],
    *,
    window: float = 0.0,
) -> Choice:
    """Choose the pictures of the next step.

    Args:
        waiting: all pictures that are ready for a step.
        now: the time, in seconds.
        best_size: the number of pictures, at most the given one, of which a run is fastest per picture.
        window: how many seconds a first step waits for others to fill its batch, while nothing runs.
    """
    if not waiting:
        return Choice()
    head = min(waiting, key=_order)
    group = sorted((one for one in waiting if one.key == head.key), key=_order)
    size = best_size(head.key, len(group))
    end = head.since + window
    alone = not any(one.started for one in waiting)
    if alone and now < end and len(group) < best_size(head.key, len(group) + 1):
        return Choice(wait_until=end)
    return Choice(ids=tuple(one.id for one in group[:size]))


def _order(one: Waiting) -> tuple[float, int]:
    return one.due, one.id
