"""Why one picture of a request could not be drawn. States and results carry this, while the other pictures go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ditc.runtime.errors import NumericsError

if TYPE_CHECKING:
    from ditc.runtime.request import Request
    from ditc.runtime.state import DenoiseState


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One picture that is lost.

    Attributes:
        index: the picture's place: among the samples of its state, or, in an Output, among the request's pictures.
        reason: what happened, beginning with the stage.
        hint: what the user can do about it.
        step: the number of the denoising step that spoiled it, counted from 1; None if it was another stage.
        prompt: the picture's text, in an Output; "" if the request gave embeddings.
    """

    index: int
    reason: str
    hint: str | None = None
    step: int | None = None
    prompt: str = ""

    def __str__(self) -> str:
        text = f" ({self.prompt!r:.80})" if self.prompt else ""
        return f"picture {self.index}{text}: {self.reason}"


def failures_of(states: Sequence[DenoiseState], request: Request | None = None) -> list[Failure]:
    """The failures of a request's states, with the index and the prompt of each picture in the request."""
    failures, first = [], 0
    for state in states:
        for failure in state.failures:
            failures.append(named(failure, first + failure.index, request))
        first += state.latents.shape[0]
    return failures


def named(failure: Failure, index: int, request: Request | None) -> Failure:
    """The failure with the picture's index and prompt in the request."""
    return replace(failure, index=index, prompt="" if request is None else request.prompt_of(index))


def check_failures(failures: Sequence[Failure], pictures: int, *, strict: bool) -> None:
    """Raise NumericsError if every picture of a request has failed, or, if `strict`, one of them."""
    if not failures or not (strict or len(failures) == pictures):
        return
    first = failures[0]
    if pictures == 1:
        raise NumericsError(first.reason, hint=first.hint)
    raise NumericsError(f"{len(failures)} of {pictures} pictures failed; {first}", hint=first.hint)
