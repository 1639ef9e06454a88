"""Requests and events are the same after their way between front and replica."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ditc.runtime.failure import Failure
from ditc.runtime.image_input import GivenImages
from ditc.runtime.request import Request
from ditc.runtime.serving.refusals import Overloaded
from ditc.runtime.serving.replicas.messages import (
    event_of_message,
    message_of_event,
    message_of_request,
    request_of_message,
)
from ditc.runtime.serving.scheduling.job import Cancelled, Finished, Preview, Progress, Refused

RED = Image.new("RGB", (4, 2), "red")


def test_a_request_is_the_same_and_its_message_holds_no_picture_objects() -> None:
    array = np.ones((2, 4, 3), np.float32)
    request = Request(prompt="cat", seed=3, image=GivenImages((RED, array)), guidance_interval=(0.2, 0.8))
    message = message_of_request(request)
    assert message.keys() == {"prompt", "seed", "image", "guidance_interval"}
    assert message["image"][0] == ("RGB", (4, 2), RED.tobytes())
    again = request_of_message(message)
    assert (again.prompt, again.seed, again.guidance_interval) == ("cat", 3, (0.2, 0.8))
    assert again.image.pictures[0].tobytes() == RED.tobytes() and again.image.pictures[1] is array


@pytest.mark.parametrize("name", ["image", "mask_image", "control_image"])
def test_every_picture_of_a_request_arrives_as_one(name: str) -> None:
    request = Request(prompt="cat", **{name: GivenImages((RED,))})
    again = getattr(request_of_message(message_of_request(request)), name)
    assert isinstance(again, GivenImages) and again.pictures[0].tobytes() == RED.tobytes()


def test_events_are_the_same() -> None:
    failure = Failure(index=1, reason="NaN", hint="try fp32", step=2, prompt="cat")
    finished = Finished(images=(RED, None), failures=(failure,), seconds={"total": 1.0})
    for event in (Progress(step=1, total=3), Progress(step=3, total=3, frame=5), Cancelled()):
        assert event_of_message(message_of_event(event)) == event
    again = event_of_message(message_of_event(finished))
    assert isinstance(again, Finished) and again.images[0] is not None and again.images[1] is None
    assert again.images[0].tobytes() == RED.tobytes()
    assert again.failures == (failure,) and again.seconds == {"total": 1.0}
    film = Finished(images=(), failures=(failure,), seconds={}, videos=((RED, RED), None))
    shown = event_of_message(message_of_event(film))
    assert isinstance(shown, Finished) and shown.images == () and shown.videos[1] is None
    assert shown.videos[0] is not None and [one.tobytes() for one in shown.videos[0]] == [RED.tobytes()] * 2
    preview = event_of_message(message_of_event(Preview(index=1, number=2, step=3, image=RED)))
    assert isinstance(preview, Preview) and (preview.index, preview.number, preview.step) == (1, 2, 3)
    refusal = Overloaded("the queue is full", hint="come back later", retry_after=2.0)
    refused = event_of_message(message_of_event(Refused(refusal)))
    assert isinstance(refused, Refused)
    names = ("status", "code", "hint", "param", "retry_after")
    assert [getattr(refused.refusal, n) for n in names] == [getattr(refusal, n) for n in names]
    assert str(refused.refusal) == str(refusal)
