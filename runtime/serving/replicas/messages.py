"""What front and replicas tell each other: requests and events as plain values, without objects of a client.

Pictures are (mode, size, bytes), arrays stay arrays. The pixels of finished pictures and of videos go in parts of a
bounded size, because all frames of a video can be more than Ray's shared memory holds. The front and its replicas must
be of one version of ditc.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

from PIL import Image

from ditc.runtime.errors import DitcError
from ditc.runtime.failure import Failure
from ditc.runtime.image_input import GivenImages
from ditc.runtime.request import Request
from ditc.runtime.serving.refusals import Refusal
from ditc.runtime.serving.scheduling.job import (
    Cancelled,
    Event,
    Finished,
    Preview,
    Progress,
    Refused,
)
from ditc.runtime.serving.scheduling.step_times import Measurements
from ditc.runtime.session import ComputeDevice
from ditc.runtime.spec import StageSpec

Message = dict[str, Any]
# The most bytes of pixels in one message of an end. Many pictures and small videos are one part.
PART_BYTES = 4 * 1024**2
_FAILURE = ("index", "reason", "hint", "step", "prompt")
# The fields of a request that hold pictures.
_PICTURES = ("image", "mask_image", "control_image")


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a bundle.

    Attributes:
        name: under which it is served.
        digest: of its manifest, which names all its files by their hashes.
    """

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} version {self.digest[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a replica has opened, so that the front can check requests as the replica will.

    Attributes:
        place: the bundle's folder on the replica's node.
        stages: the spec of every stage, and what it computes on.
        loras: the LoRAs in the weights, as pictures name them.
        max_batch: the most pictures of one run.
        sizes: the batch sizes that the denoiser has graphs for.
        size_bytes: the memory that it takes.
        times: measured when it was warmed up.
    """

    place: str
    stages: Mapping[str, tuple[StageSpec, ComputeDevice]]
    backend: str
    precision: str
    uncertified: str
    chosen: str
    loras: list[dict[str, object]]
    max_batch: int
    sizes: tuple[int, ...]
    size_bytes: int
    times: Measurements


def message_of_request(request: Request) -> Message:
    """The fields that differ from their defaults."""
    message: Message = {}
    for field in fields(Request):
        value = getattr(request, field.name)
        if value is field.default:
            continue
        message[field.name] = _plain_images(value) if isinstance(value, GivenImages) else value
    return message


def request_of_message(message: Message) -> Request:
    """The request of `message_of_request`."""
    images: Message = {name: _given_images(message[name]) for name in _PICTURES if name in message}
    return Request(**{**message, **images})


def messages_of_event(event: Event) -> Iterator[Message]:
    """An event, as messages for `event_of_message`. They are made one by one.

    The last message tells its kind. Only the end of a request that is done has earlier ones, of the kind "pixels": all
    but the last PART_BYTES of its pictures and frames.
    """
    if isinstance(event, Progress):
        yield {"kind": "progress", "step": event.step, "total": event.total, "frame": event.frame}
    elif isinstance(event, Preview):
        picture = plain_picture(event.image)
        yield {
            "kind": "preview",
            "index": event.index,
            "number": event.number,
            "step": event.step,
            "image": picture,
        }
    elif isinstance(event, Finished):
        frames = (frame for video in event.videos if video is not None for frame in video)
        parts = _parts_of(chain((image for image in event.images if image is not None), frames))
        part = next(parts)
        for following in parts:
            yield {"kind": "pixels", "pixels": part}
            part = following
        yield {
            "kind": "finished",
            "images": [None if image is None else _shape_of(image) for image in event.images],
            "failures": [{name: getattr(one, name) for name in _FAILURE} for one in event.failures],
            "seconds": event.seconds,
            "videos": [
                None if video is None else [_shape_of(frame) for frame in video] for video in event.videos
            ],
            "pixels": part,
        }
    elif isinstance(event, Refused):
        yield Message(kind="refused", **plain_refusal(event.refusal))
    else:
        yield Message(kind="cancelled")


def event_of_message(message: Message, earlier: deque[bytes] | None = None) -> Event:
    """The event of `messages_of_event`, by its last message.

    Args:
        earlier: the pixels of the messages before it. They are taken out one by one, so that they and the pictures are
            not in memory together.

    Raises:
        ValueError: parts of the pixels are missing.
    """
    kind = message["kind"]
    if kind == "progress":
        return Progress(step=message["step"], total=message["total"], frame=message["frame"])
    if kind == "preview":
        return Preview(
            index=message["index"],
            number=message["number"],
            step=message["step"],
            image=picture_of(message["image"]),
        )
    if kind == "finished":
        parts = deque[bytes]() if earlier is None else earlier
        parts.append(message["pixels"])
        pixels = _Pixels(parts)
        return Finished(
            images=tuple(None if shape is None else pixels.take(shape) for shape in message["images"]),
            failures=tuple(Failure(**one) for one in message["failures"]),
            seconds=message["seconds"],
            videos=tuple(
                None if video is None else tuple(pixels.take(shape) for shape in video)
                for video in message["videos"]
            ),
        )
    if kind == "refused":
        return Refused(refusal_of(message))
    return Cancelled()


def plain_refusal(refusal: Refusal) -> Message:
    """All that an answer is made of."""
    return {
        "message": str(refusal),
        "hint": refusal.hint,
        "param": refusal.param,
        "retry_after": refusal.retry_after,
        "status": refusal.status,
        "code": refusal.code,
    }


def refusal_of(message: Message) -> Refusal:
    """The refusal of `plain_refusal`."""
    names = ("hint", "param", "retry_after", "status", "code")
    return Refusal(message["message"], **{name: message[name] for name in names})


def plain_error(error: DitcError) -> Message:
    """An error for the operator, whom its text and its hint tell all."""
    return {"error": str(error), "hint": error.hint}


def plain_picture(image: Image.Image) -> tuple[str, tuple[int, int], bytes]:
    """Mode, size and pixels."""
    return image.mode, image.size, image.tobytes()


def picture_of(plain: tuple[str, tuple[int, int], bytes]) -> Image.Image:
    """The picture of `plain_picture`."""
    mode, size, pixels = plain
    return Image.frombytes(mode, size, pixels)


def _plain_images(images: GivenImages) -> list[Any]:
    return [plain_picture(one) if isinstance(one, Image.Image) else one for one in images.pictures]


def _given_images(plain: list[Any]) -> GivenImages:
    return GivenImages(tuple(picture_of(one) if isinstance(one, tuple) else one for one in plain))


def _shape_of(image: Image.Image) -> tuple[str, tuple[int, int], int]:
    """Mode, size, and the number of bytes of its pixels: those of drawn pictures are a byte per band."""
    return image.mode, image.size, len(image.getbands()) * image.width * image.height


def _parts_of(pictures: Iterable[Image.Image]) -> Iterator[bytes]:
    """The pixels of all pictures, one after the other, in parts that are full but for the last; at least one part."""
    part = bytearray()
    for picture in pictures:
        pixels = memoryview(picture.tobytes())
        while pixels:
            if len(part) == PART_BYTES:
                yield bytes(part)
                part.clear()
            room = PART_BYTES - len(part)
            part += pixels[:room]
            pixels = pixels[room:]
    yield bytes(part)


class _Pixels:
    """Pictures from the parts of `_parts_of`, which are taken out."""

    def __init__(self, parts: deque[bytes]) -> None:
        self._parts, self._begun = parts, 0  # and how many bytes of the first part are used

    def take(self, shape: tuple[str, tuple[int, int], int]) -> Image.Image:
        """The next picture. Raises ValueError if its pixels are not all there."""
        mode, size, count = shape
        found: list[memoryview] = []
        while count and self._parts:
            taken = memoryview(self._parts[0])[self._begun : self._begun + count]
            found.append(taken)
            self._begun += len(taken)
            count -= len(taken)
            if self._begun == len(self._parts[0]):
                self._parts.popleft()
                self._begun = 0
        return Image.frombytes(mode, size, b"".join(found))
