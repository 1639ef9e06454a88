"""Errors about a checkpoint name the file, also where the code that finds them sees only what the file holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ditc.runtime.errors import CheckpointError


@contextmanager
def naming(place: Path | str, *, hint: str | None = None) -> Iterator[None]:
    """Put the file, folder or component before the message of a CheckpointError that is raised inside.

    Args:
        place: what the error is about. A message that has it already stays as it is.
        hint: for errors that have none of their own.
    """
    try:
        yield
    except CheckpointError as error:
        message = str(error) if str(place) in str(error) else f"{place}: {error}"
        raise CheckpointError(message, hint=error.hint or hint) from error
