"""The name of a model, what is opened under it, and what clients may know of that."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from ditc.runtime.errors import DitcError
from ditc.runtime.serving.model import Model


@dataclass(eq=False)
class Slot:
    """A name, and what is opened under it."""

    name: str
    bundle: Path
    model: Model | None = None  # the version for new requests
    loading: Future[None] | None = None  # done when the load has ended, in any way
    waiting: int = 0  # requests that wait until it is open
    used: float = 0.0
    size_bytes: int = 0  # what the last version took
    error: DitcError | None = None  # of the last load
    failures: int = 0
    again: float = 0.0  # when to try again


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """What clients may know of a model's state.

    Attributes:
        state: ready, loading, not_loaded, failed or unavailable.
        reason: in a sentence, if it is not ready.
        awaited: whether the server is not ready without it.
    """

    name: str
    state: str
    reason: str = ""
    awaited: bool = False


def state_of(slot: Slot, name: str, *, awaited: bool) -> ModelState:
    """The state of a model. Its words are for clients, so they hold nothing of what a library said.

    Args:
        name: the slot's, or that of a model which shares the slot's sessions.
    """
    if slot.model is not None:
        reason = slot.model.scheduler.problem
        state = "unavailable" if reason else "ready"
        if not reason and slot.model.under(name) is None:
            state, reason = "failed", "its LoRA could not be read"
    elif slot.loading is not None:
        state, reason = "loading", "it is being opened"
    elif slot.error is not None:
        state, reason = "failed", "it could not be opened"
    else:
        state, reason = "not_loaded", "it is opened when it is asked for"
    return ModelState(name=name, state=state, reason=reason, awaited=awaited)
