"""Draws what the form asks for, and yields what the page shows on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import monotonic

from PIL import Image

from ditc.runtime.png import picture_settings
from ditc.runtime.prepare import Plan
from ditc.runtime.request import Request
from ditc.runtime.serving.api.encoding import encode
from ditc.runtime.serving.api.kinds import check_kind
from ditc.runtime.serving.api.request_limits import RequestLimits
from ditc.runtime.serving.http.callers import Caller
from ditc.runtime.serving.http.errors import refusal_of
from ditc.runtime.serving.http.request_ids import new_id
from ditc.runtime.serving.log_text import where_raised
from ditc.runtime.serving.model import Model
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Invalid, Refusal
from ditc.runtime.serving.scheduling.admission import work_of
from ditc.runtime.serving.scheduling.job import (
    Cancelled,
    End,
    Event,
    Finished,
    Job,
    Preview,
    Progress,
    Refused,
)
from ditc.runtime.serving.ui import html
from ditc.runtime.serving.ui.html import Shown
from ditc.runtime.serving.ui.visitors import Visitors

log = logging.getLogger(__name__)

PREVIEWS = 8
# The shortest time between two views. A browser needs no more, and steps of small models take milliseconds.
PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class View:
    """What the page shows at one moment.

    Attributes:
        seed: which seed was used; None until the request is done.
        ended: whether it is the last view of the request.
    """

    html: str
    seed: int | None = None
    ended: bool = False


def views(
    models: Models,
    name: str,
    wanted: Callable[[], Request],
    *,
    limits: RequestLimits,
    caller: Caller,
    visitors: Visitors,
    visit: str,
) -> Iterator[View]:
    """Draw, and yield a view whenever something has happened. Closing the generator cancels the request.

    Nothing is drawn for a visit that reads no events. Every error ends in a view.

    Args:
        wanted: reads the form; what a client has sent may be of other types than the page sends.
        caller: whose allowance is used.
    """
    id = new_id()
    try:
        if not visitors.is_streaming(visit):
            return
        request = _asked(wanted)
        limits.check_request(request)
        yield View(html.progress("Opening the model"))
        with models.using(name) as model:
            events: SimpleQueue[Event] = SimpleQueue()
            check_kind(model.pipeline.manifest, name, videos=False)  # it may have been built again
            plan = model.plan(request)
            limits.check_plan(plan)
            with caller.drawing(work_of(plan)):
                job = model.scheduler.submit(plan, events.put, id=id, previews=PREVIEWS)
                with visitors.working(visit, lambda: model.scheduler.cancel(job)):
                    yield from _follow(model, job, events)
    except Exception as e:
        refusal = refusal_of(e)
        if refusal is None:
            log.error("request %s of the page failed:\n%s", id, where_raised(e))
            refusal = Refusal("the server has failed", hint="its log says more")
        yield View(html.problem(str(refusal), refusal.hint), ended=True)


def _asked(wanted: Callable[[], Request]) -> Request:
    try:
        return wanted()
    except (TypeError, ValueError, OverflowError, LookupError, AttributeError) as e:
        raise Invalid("the form is not filled in", hint="give every number a value") from e


def _follow(model: Model, job: Job, events: SimpleQueue[Event]) -> Iterator[View]:
    previews: dict[int, Shown] = {}
    progress = Progress(step=0, total=job.plan.runs)
    yield View(html.progress("Waiting for its turn"))
    while True:
        for event in _gathered(events):
            if isinstance(event, Progress):
                progress = event
            elif isinstance(event, Preview):
                caption = f"Preview after step {event.step}"
                previews[event.index] = Shown(png=encode(event.image, "png", 100, {}), caption=caption)
            elif isinstance(event, Finished):
                yield _finished(model, job, event)
                return
            else:
                yield _ended(event)
                return
        text = f"Step {progress.step} of {progress.total}"
        bar = html.progress(text, progress.step, progress.total)
        yield View(bar + html.pictures([previews[index] for index in sorted(previews)]))


def _gathered(events: SimpleQueue[Event]) -> list[Event]:
    """What has happened: at least one event, and all of a moment, so that the page is not flooded."""
    found, until = [events.get()], monotonic() + PAUSE
    while not isinstance(found[-1], End) and (left := until - monotonic()) > 0:
        try:
            found.append(events.get(timeout=left))
        except Empty:
            break
    return found


def _finished(model: Model, job: Job, event: Finished) -> View:
    plan = job.plan
    shown = [
        Shown(png=_png(model, plan, index, image), caption=_caption(plan), name=_file_name(plan, index))
        for index, image in enumerate(event.images)
        if image is not None
    ]
    text = f"Done in {event.seconds['total']:.1f} s. The seed was {plan.seed}."
    lost = "".join(html.problem(str(failure)) for failure in event.failures)
    return View(html.done(text) + lost + html.pictures(shown), seed=plan.seed, ended=True)


def _ended(event: Refused | Cancelled) -> View:
    if isinstance(event, Cancelled):
        return View(html.done("Cancelled."), ended=True)
    return View(html.problem(str(event.refusal), event.refusal.hint), ended=True)


def _caption(plan: Plan) -> str:
    guidance = f" · guidance {plan.guidance_scale:g}" if plan.guided else ""
    steps = f"{plan.num_inference_steps} step{'s' if plan.num_inference_steps > 1 else ''}"
    parts = f"Seed {plan.seed} · {steps}{guidance} · {plan.width} × {plan.height}".split(" · ")
    return " · ".join(
        part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts
    )  # lines break between parts alone


def _file_name(plan: Plan, index: int) -> str:
    place = f"-{index + 1}" if plan.pictures > 1 else ""
    return f"ditc-{plan.seed}{place}.png"


def _png(model: Model, plan: Plan, index: int, image: Image.Image) -> bytes:
    """The picture as a file that holds its settings."""
    pipeline = model.pipeline
    backend = f"{pipeline.backend} {pipeline.precision}".strip()
    return encode(image, "png", 100, picture_settings(pipeline, plan, index, backend=backend))
