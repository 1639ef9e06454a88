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


class Tally:
    """The failures of a request whose states are run one after the other.

    Args:
        pictures: how many the request has.
        request: names the pictures, and says whether to be strict; None for states without a request.
    """

    def __init__(self, pictures: int, request: Request | None) -> None:
        self._pictures, self._request = pictures, request
        self._strict = request is not None and request.strict
        self._known: list[Failure] = []
        self.first = 0  # the index of the next state's first picture

    def check(self, state: DenoiseState) -> None:
        """Raise NumericsError if with those of the state every picture has failed, or one has and that must not be."""
        if state.failures:
            found = [named(one, self.first + one.index, self._request) for one in state.failures]
            check_failures([*self._known, *found], self._pictures, strict=self._strict)

    def add(self, found: Sequence[Failure], pictures: int) -> None:
        """Count the failures of a finished state, which have the indices of the request.

        Raises:
            NumericsError: as `check`.
        """
        self._known += found
        self.first += pictures
        check_failures(self._known, self._pictures, strict=self._strict)

    def add_state(self, state: DenoiseState) -> None:
        """The same for a state that is not decoded."""
        found = [named(one, self.first + one.index, self._request) for one in state.failures]
        self.add(found, state.latents.shape[0])


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
