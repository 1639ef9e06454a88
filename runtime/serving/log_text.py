"""What the log says of errors: not their messages, which may quote prompts."""

from __future__ import annotations

import traceback


def where_raised(error: BaseException) -> str:
    """The traceback without messages, which may quote prompts."""
    kinds: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(kinds) < 5:
        kinds.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return "".join(traceback.format_tb(error.__traceback__)) + " from ".join(kinds)
