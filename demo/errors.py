"""The exception of the demo scripts. It has a message that says what happened and a hint that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ditc.runtime.errors import OutputError


class DemoError(Exception):
    """A failure that the user can do something about. The command lines print it without a traceback.

    Args:
        message: what happened, with the values.
        hint: what to do about it.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        return f"{super().__str__()} hint: {self.hint}"


@contextmanager
def explained() -> Iterator[None]:
    """Turn an OutputError (a file that cannot be written) into a DemoError with the same message and hint."""
    try:
        yield
    except OutputError as e:
        raise DemoError(f"{e}.", f"{e.hint}.") from e
