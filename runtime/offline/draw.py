"""Draws lines with one bundle in this process. Lines of one shape share runs of the denoiser, as those of clients do.

The scheduler of `ditc serve` (runtime/serving/scheduling) decides which pictures run together, by measured times. A
picture does not depend on its company.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ditc.runtime.bundle.manifest import Defaults
from ditc.runtime.errors import DitcError, UsageError
from ditc.runtime.image_input import GivenImages
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.offline.lines import Line
from ditc.runtime.offline.result import VideoFiles, drawn, failed
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan, make_plan
from ditc.runtime.request import Request
from ditc.runtime.request_checks import checked
from ditc.runtime.serving.api.request_limits import DEFAULTS as OF_A_SERVER
from ditc.runtime.serving.model import recorded_times
from ditc.runtime.serving.refusals import Refusal
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.scheduling.job import Cancelled, End, Event, Finished, Refused
from ditc.runtime.serving.scheduling.scheduler import Scheduler
from ditc.runtime.serving.scheduling.warm_up import begin_with, warm_up
from ditc.runtime.serving.settings import Bounds, SchedulerOptions
from ditc.runtime.sizes import size_like

# How long larger batches are tried before the first line. It costs more than it gains if there are few lines.
WARM_UP_S = 10.0
LINES_WORTH_WARMING_UP = 16
# Lines in work beyond the largest batch: their texts are encoded and their pictures saved while others are stepped. A
# denoiser that takes thousands of samples does not need so many lines at once.
LINES_AHEAD, MOST_LINES = 4, 64
# The frames of a finished video take its pixels in memory until its file is written.
VIDEOS_AHEAD = 1
# Pixels of all frames of a line with several videos. They are in memory until the last one is drawn: 0.8 GB.
MOST_VIDEO_PIXELS = OF_A_SERVER.max_video_pixels
# A stage that fails may fail again because of the line itself.
ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class _Ended:
    line: Line
    plan: Plan | None
    end: End


class Drawer:
    """A bundle with a scheduler over it.

    Args:
        folder: gets the pictures or videos.
        inputs: the folder of the input file, in which the pictures lie that lines name.
        max_batch: the most pictures of one run; 0 takes as many as the bundle allows.
        lines: about how many lines there are.
        videos: which files to write; None for a bundle that draws pictures.

    Attributes:
        window: how many lines to submit before the first result is taken.

    Raises:
        DitcError: as `Pipeline.load`.
    """

    def __init__(
        self,
        bundle: Path,
        load: LoadOptions,
        folder: Path,
        *,
        inputs: Path,
        max_batch: int = 0,
        lines: int = 0,
        videos: VideoFiles | None = None,
    ) -> None:
        self._folder, self._inputs, self._videos = folder, inputs, videos
        self._ended = SimpleQueue[_Ended]()
        self._attempts: dict[int, int] = {}
        self._scheduler = Scheduler(
            Pipeline.load(bundle, options=load),
            admission=Admission(Bounds(requests=2 * MOST_LINES, pixel_steps=sys.maxsize)),
            reopen=lambda: Pipeline.load(bundle, options=load),
            options=SchedulerOptions(max_batch=max_batch),
        )
        ahead = LINES_AHEAD if videos is None else VIDEOS_AHEAD
        self.window = min(self._scheduler.max_batch + ahead, MOST_LINES)
        try:
            recorded = recorded_times(bundle, self._scheduler.pipeline, load)
            begin_with(self._scheduler.pipeline, self._scheduler.times, recorded)
            if recorded is None and lines >= LINES_WORTH_WARMING_UP and self._scheduler.max_batch > 1:
                warm_up(self._scheduler.pipeline, self._scheduler.times, seconds=WARM_UP_S)
            self._scheduler.start()
        except BaseException:
            self._scheduler.close()
            raise

    @property
    def pipeline(self) -> Pipeline:
        return self._scheduler.pipeline

    def submit(self, line: Line) -> None:
        """Begin to draw a line. `take` returns its result."""
        self._attempts[line.number] = self._attempts.get(line.number, 0) + 1
        plan = None
        try:
            request = _sized(checked(line.request(self._inputs)), self.pipeline.manifest.defaults)
            plan = replace(make_plan(request, self.pipeline.drawable), seed=line.seed)
            _check_videos(plan)
            self._scheduler.submit(plan, self._listener(line, plan), id=str(line.number))
        except UsageError as error:
            self._ended.put(_Ended(line, plan, Refused(_refusal(error))))
        except Refusal as refusal:
            self._ended.put(_Ended(line, plan, Refused(refusal)))

    def take(self) -> dict[str, Any]:
        """The result of the line that ends next. Waits for it; its pictures are written.

        Raises:
            OutputError: a picture cannot be written.
        """
        while True:
            ended = self._ended.get()
            line, end = ended.line, ended.end
            if isinstance(end, Finished):
                del self._attempts[line.number]
                assert ended.plan is not None
                return drawn(line, ended.plan, self.pipeline, end, self._folder, self._videos)
            refusal = end.refusal if isinstance(end, Refused) else None
            again = refusal is not None and refusal.retry_after is not None
            if again and self._attempts[line.number] < ATTEMPTS:
                self.submit(line)
                continue
            del self._attempts[line.number]
            message, hint = ("it was cancelled", None) if refusal is None else (str(refusal), refusal.hint)
            return failed(line.number, line.id, message, hint)

    def close(self) -> None:
        """End what is in work, and close the bundle."""
        self._scheduler.close()

    def _listener(self, line: Line, plan: Plan) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if isinstance(event, Finished | Refused | Cancelled):
                self._ended.put(_Ended(line, plan, event))

        return listen


def _sized(request: Request, defaults: Defaults) -> Request:
    """The request with the size that fits its picture, if it names none, as `ditc run` chooses it."""
    image = request.control_image if request.image is None else request.image
    if not isinstance(image, GivenImages) or not request.height is request.width is None:
        return request
    height, width = size_like(*image.size(), defaults)
    return replace(request, height=height, width=width)


def _check_videos(plan: Plan) -> None:
    """Refuse several videos that lines of their own would draw with less memory.

    Raises:
        UsageError: they have more pixels together than one request may have on a server with its default bounds. One
            video alone is as large as the bundle allows.
    """
    one = max(plan.height * plan.width, plan.drawn_height * plan.drawn_width) * (plan.frames or 0)
    if plan.pictures > 1 and one * plan.pictures > MOST_VIDEO_PIXELS:
        raise UsageError(
            f"num_images_per_prompt is {plan.pictures}, and the {plan.frames} frames of each video have {one} pixels: "
            f"{one * plan.pictures} together, of at most {MOST_VIDEO_PIXELS}",
            hint="write a line for every video",
        )


def _refusal(error: DitcError) -> Refusal:
    return Refusal(str(error), hint=error.hint)
