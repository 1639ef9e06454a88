"""Requests and events are the same after their way between front and replica."""

from __future__ import annotations

import pickle
from collections import deque

import numpy as np
import pytest
from PIL import Image

from ditc.runtime.failure import Failure
from ditc.runtime.image_input import GivenImages
from ditc.runtime.request import Request
from ditc.runtime.serving.refusals import Overloaded
from ditc.runtime.serving.replicas import messages
from ditc.runtime.serving.replicas.messages import (
    event_of_message,
    message_of_request,
    messages_of_event,
    request_of_message,
)
from ditc.runtime.serving.scheduling.job import Cancelled, Event, Finished, Preview, Progress, Refused

RED = Image.new("RGB", (4, 2), "red")


def sent(event: Event) -> Event:
    """An event after its way."""
    *earlier, last = messages_of_event(event)
    return event_of_message(last, deque(one["pixels"] for one in earlier))


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
        assert sent(event) == event
    again = sent(finished)
    assert isinstance(again, Finished) and again.images[0] is not None and again.images[1] is None
    assert again.images[0].tobytes() == RED.tobytes()
    assert again.failures == (failure,) and again.seconds == {"total": 1.0}
    film = Finished(images=(), failures=(failure,), seconds={}, videos=((RED, RED), None))
    shown = sent(film)
    assert isinstance(shown, Finished) and shown.images == () and shown.videos[1] is None
    assert shown.videos[0] is not None and [one.tobytes() for one in shown.videos[0]] == [RED.tobytes()] * 2
    preview = sent(Preview(index=1, number=2, step=3, image=RED))
    assert isinstance(preview, Preview) and (preview.index, preview.number, preview.step) == (1, 2, 3)
    refusal = Overloaded("the queue is full", hint="come back later", retry_after=2.0)
    refused = sent(Refused(refusal))
    assert isinstance(refused, Refused)
    names = ("status", "code", "hint", "param", "retry_after")
    assert [getattr(refused.refusal, n) for n in names] == [getattr(refusal, n) for n in names]
    assert str(refused.refusal) == str(refusal)


@pytest.mark.parametrize("most", [1, 7, 24, 25, 48, 72, 100])
def test_pixels_go_in_messages_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Frames that are larger than a message, that fill it exactly, and of which it holds several."""
    monkeypatch.setattr(messages, "PART_BYTES", most)
    numbers = np.random.default_rng(0)
    frames = tuple(Image.fromarray(numbers.integers(0, 256, (2, 4, 3), np.uint8)) for _ in range(3))
    film = Finished(images=(None,), failures=(), seconds={}, videos=(frames, None, frames[:2]))
    *earlier, last = messages_of_event(film)
    assert all(one.keys() == {"kind", "pixels"} and len(one["pixels"]) == most for one in earlier)
    assert len(last["pixels"]) <= most and len(earlier) == -(-5 * 24 // most) - 1
    assert (
        max(len(pickle.dumps(one)) for one in [*earlier, last]) < most + 1000
    )  # 1000: the names and the sizes
    parts = deque(one["pixels"] for one in earlier)
    again = event_of_message(last, parts)
    assert isinstance(again, Finished) and not parts
    assert again.videos == film.videos and again.images == (None,)  # of PIL, compared by their pixels


def test_pixels_that_are_missing_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PART_BYTES", 10)
    last = list(messages_of_event(Finished(images=(RED,), failures=(), seconds={})))[-1]
    with pytest.raises(ValueError, match="not enough image data"):
        event_of_message(last)
