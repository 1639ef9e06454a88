"""Results as the bodies of answers. They hold megabytes, so they are made on threads of `Encoder`."""

from __future__ import annotations

from base64 import b64encode

from ditc.runtime.serving.api.answers import CompletedEvent, ImagesAnswer, Picture, Usage, usage
from ditc.runtime.serving.api.results import Result


def images_answer(result: Result) -> bytes:
    """The JSON of OpenAI's answer with all pictures."""
    answer = ImagesAnswer(
        created=result.created,
        data=[Picture(b64_json=base64(file), index=index) for index, file in drawn(result)],
        output_format=result.asked.format,
        size=size_of(result),
        usage=usage_of(result),
        ditc=result.details,
    )
    return answer.model_dump_json().encode()


def completed_event(result: Result, index: int, file: bytes, *, first: bool) -> CompletedEvent:
    """The event with one finished picture. The first one counts the texts of the request."""
    return CompletedEvent(
        b64_json=base64(file),
        created_at=result.created,
        image_index=index,
        output_format=result.asked.format,
        size=size_of(result),
        usage=usage(text_tokens=result.text_tokens if first else 0, picture_tokens=result.picture_tokens),
        ditc=result.details,
    )


def drawn(result: Result) -> list[tuple[int, bytes]]:
    """The pictures that did not fail, with their indices."""
    return [(index, file) for index, file in enumerate(result.pictures) if file is not None]


def size_of(result: Result) -> str:
    """The size of the pictures in OpenAI's form."""
    return f"{result.details.width}x{result.details.height}"


def usage_of(result: Result) -> Usage:
    """The tokens of the whole request."""
    return usage(text_tokens=result.text_tokens, picture_tokens=len(drawn(result)) * result.picture_tokens)


def base64(file: bytes) -> str:
    """The text of b64_json."""
    return b64encode(file).decode("ascii")
