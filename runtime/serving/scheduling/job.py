"""A client's request from its acceptance to its one end, and what is reported of it on the way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ditc.runtime.failure import Failure
from ditc.runtime.guard import Guard
from ditc.runtime.padding import Padding
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.log_text import where_raised
from ditc.runtime.serving.refusals import Refusal
from ditc.runtime.serving.scheduling.policy import BatchKey
from ditc.runtime.session import Tensor, to_numpy
from ditc.runtime.spec import DENOISER
from ditc.runtime.state import DenoiseState, Rows

log = logging.getLogger(__name__)

# All frames of one video.
Frames = tuple[Image.Image, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is done, of all pictures together.

    Attributes:
        step, total: the number of steps that are done, and of all steps.
        frame: the number of decoded frames of videos.
    """

    step: int
    total: int
    frame: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """A rough picture of what the denoiser predicts, one pixel per latent cell.

    Attributes:
        index: which of the request's pictures it is.
        number: which of the wanted previews it is, from 0.
        step: the number of steps done.
    """

    index: int
    number: int
    step: int
    image: Image.Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The request is done.

    Attributes:
        images: None in the place of a picture that failed. Empty if the request is for videos.
        failures: why those failed; not all have.
        seconds: by part: wait (until its work began), text, denoise, decode, total.
        videos: the frames of each video; None in the place of one that failed.
    """

    images: tuple[Image.Image | None, ...]
    failures: tuple[Failure, ...]
    seconds: dict[str, float]
    videos: tuple[Frames | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The request ended without a picture."""

    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client has cancelled the request, or gone away."""


End = Finished | Refused | Cancelled
Event = Progress | Preview | End


@dataclass(eq=False, kw_only=True)
class Job:
    """One accepted request.

    Attributes:
        id: for logs and for the client.
        plan: its pictures are drawn one per state, so that each can join a batch by itself.
        listener: gets every event, and the end exactly once. It is called on the scheduler's threads and must not
            block.
        arrived, due, deadline: seconds on the scheduler's clock; see `policy.due_time`.
        previews: how many previews of each picture are wanted.
        variant: which of the scheduler's variants draws it; "" for the bundle as it is.
        predicted: the seconds from its arrival to its end that were estimated when it arrived.
        began: when its text was taken up; None as long as it waits.
        decoded: by the index of each video, how many of its frames are decoded.
        images, videos: what is done, by index; None for one that has failed.
    """

    id: str
    plan: Plan
    listener: Callable[[Event], None]
    arrived: float
    due: float
    deadline: float | None = None
    previews: int = 0
    variant: str = ""
    predicted: float = 0.0
    began: float | None = None
    steps_done: int = 0
    decoded: dict[int, int] = field(default_factory=dict)
    images: dict[int, Image.Image | None] = field(default_factory=dict)
    videos: dict[int, Frames | None] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    cancelled: bool = False
    end: End | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def frames_done(self) -> int:
        """The number of frames that are decoded, of all videos together; 0 for pictures."""
        return sum(self.decoded.values())

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(step=self.steps_done, total=self.plan.runs, frame=self.frames_done)

    def report(self, event: Progress | Preview) -> None:
        """Tell the listener, unless the job has ended."""
        with self._lock:
            if self.end is None:
                self._tell(event)

    def finish(self, end: End) -> bool:
        """End the job and tell the listener. Only the first end counts; the result says whether this was it."""
        with self._lock:
            if self.end is not None:
                return False
            self.end = end
            self._tell(end)
            return True

    def _tell(self, event: Event) -> None:
        try:
            self.listener(event)
        except Exception as e:  # of a listener whose event loop has ended; the others must not suffer
            log.error("the listener of request %s failed, so it is cancelled:\n%s", self.id, where_raised(e))
            self.cancelled = True

    def spend(self, part: str, seconds: float) -> None:
        """Add to the time of a part of the work."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds


@dataclass(eq=False, kw_only=True)
class Picture:
    """One picture of a job between two steps.

    Attributes:
        number: increases with every picture of the scheduler, so that equal due times keep their order.
        index: its place among the job's pictures.
        state: of one sample.
        since: when it became ready for its first step.
        key: with which others it can share its next run.
    """

    number: int
    job: Job
    index: int
    state: DenoiseState
    since: float
    key: BatchKey = field(init=False)
    guard: Guard = field(default_factory=lambda: Guard(DENOISER))

    def __post_init__(self) -> None:
        self.key = batch_key(self.state, self.job.variant)

    @property
    def started(self) -> bool:
        return self.state.step_index > 0

    def advance(self, state: DenoiseState) -> None:
        """Take the state after a step. The key changes only where the next step has other rows or other control."""
        self.state = state
        if not state.done and (
            state.row_count(state.step_index) != self.key.rows or state.controlled != self.key.controlled
        ):
            self.key = batch_key(state, self.job.variant)


def batch_key(state: DenoiseState, variant: str = "") -> BatchKey:
    """What states must have in common to share the next run."""
    rows = state.rows
    texts = tuple(
        (name, tuple(_sizes(tensor, rows.padding.get(name))))
        for name, tensor in sorted(rows.conditioning.items())
    )
    return BatchKey(
        latents=tuple(state.latents.shape[1:]),
        rows=state.row_count(state.step_index) // state.latents.shape[0],
        texts=texts,
        controlled=state.controlled,
        variant=variant,
    )


def _sizes(tensor: Tensor, padding: Padding | None) -> list[int]:
    """The sizes of one row, without that which may differ within a batch."""
    left_out = {0} if padding is None else {0, padding.axis}
    return [size for axis, size in enumerate(tensor.shape) if axis not in left_out]


def picture_only(state: DenoiseState, *, predicted: bool = False) -> DenoiseState:
    """What a decoder or a preview needs of a state, on the host.

    Many pictures may wait to be decoded, and the rest of a state is far larger: its texts take up to 161 MB per row,
    and its tensors on a device keep those of the whole batch there.

    Args:
        predicted: take x0 for the latents.
    """
    latents = state.x0 if predicted and state.x0 is not None else state.result
    host = np.array(to_numpy(latents))
    none = Rows(np.empty(0, np.int64), {})
    return DenoiseState(latents=host, history=host, schedule=(), rows=none, failures=state.failures)


def preview_steps(runs: int, count: int) -> dict[int, int]:
    """After which of `runs` steps the previews are due, and the number of each; evenly spread, before the last step."""
    steps: dict[int, int] = {}
    for number in range(count):
        steps.setdefault(max(1, (number + 1) * runs // (count + 1)), number)
    return steps
