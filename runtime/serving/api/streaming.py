"""The events of a streamed answer, in the form of server-sent events.

    event: image_generation.progress        accepted, and after steps; clients that do not know it pass it on
    event: image_generation.partial_image   a preview at the size of its picture
    event: image_generation.completed       one for each picture
    event: error                            instead of completed; the official client raises it as APIError

Each client has a bounded buffer (`Events`) and one piece of encoding work at a time: one who reads too slowly gets
less progress and fewer previews. Comments keep connections open while nothing happens.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import time

from pydantic import BaseModel

from ditc.runtime.serving.api.answers import PartialEvent, ProgressEvent
from ditc.runtime.serving.api.bodies import base64, completed_event, drawn
from ditc.runtime.serving.api.drawing import Drawing
from ditc.runtime.serving.api.encoding import Encoder, encode, enlarged
from ditc.runtime.serving.api.ongoing import Ongoing
from ditc.runtime.serving.api.results import Result
from ditc.runtime.serving.http.errors import body_of, log_failure, refusal_of
from ditc.runtime.serving.refusals import Refusal
from ditc.runtime.serving.scheduling.job import Preview, Progress

KEEP_ALIVE_SECONDS = 15.0
KEEP_ALIVE = b": keep-alive\n\n"


async def events_of(
    ongoing: Ongoing, encoder: Encoder, *, reads_progress: bool, keep_alive: float
) -> AsyncGenerator[bytes]:
    """All events of a drawing, in order.

    Args:
        reads_progress: whether this is the one reader of progress and previews.
        keep_alive: seconds without an event after which a comment is sent.
    """
    drawing = ongoing.drawing
    if drawing is not None:
        yield _event(ProgressEvent(step=0, total=drawing.job.plan.runs, ditc=ongoing.details))
        waiting = _progress if reads_progress else _silence
        async with aclosing(waiting(drawing, encoder, keep_alive)) as events:
            async for event in events:
                yield event
        del drawing, events  # only the encoder needs its pictures from here on
    try:
        result = await ongoing.result()
    except Exception as error:  # the status has been sent
        refusal = refusal_of(error)
        if refusal is None:
            log_failure(error, "with events")
            refusal = Refusal("the server has failed")
        yield _named("error", json.dumps({"type": "error", **body_of(refusal)}))
        return
    for position, (index, file) in enumerate(drawn(result)):
        yield await encoder.run(_completed, result, index, file, first=position == 0)


async def _progress(drawing: Drawing, encoder: Encoder, keep_alive: float) -> AsyncGenerator[bytes]:
    """Progress and previews up to the end."""
    while True:
        event = await drawing.events.next(keep_alive)
        if event is None:
            yield KEEP_ALIVE
        elif isinstance(event, Progress):
            yield _event(ProgressEvent(step=event.step, total=event.total))
        elif isinstance(event, Preview):
            yield await encoder.run(_preview, drawing, event)
        else:
            return


async def _silence(drawing: Drawing, encoder: Encoder, keep_alive: float) -> AsyncGenerator[bytes]:
    """Only comments up to the end, for one who does not read the progress."""
    while not await drawing.events.has_ended(keep_alive):
        yield KEEP_ALIVE


def _preview(drawing: Drawing, preview: Preview) -> bytes:
    plan, asked = drawing.job.plan, drawing.asked
    file = encode(enlarged(preview.image, plan.width, plan.height), asked.format, asked.quality, {})
    return _event(
        PartialEvent(
            b64_json=base64(file),
            created_at=int(time()),
            image_index=preview.index,
            output_format=asked.format,
            size=f"{plan.width}x{plan.height}",
            partial_image_index=preview.number,
            step=preview.step,
        )
    )


def _completed(result: Result, index: int, file: bytes, *, first: bool) -> bytes:
    return _event(completed_event(result, index, file, first=first))


def _event(body: BaseModel) -> bytes:
    content = body.model_dump_json(exclude_none=True)
    return _named(str(body.type), content)  # type: ignore[attr-defined]


def _named(name: str, content: str) -> bytes:
    return f"event: {name}\ndata: {content}\n\n".encode()
