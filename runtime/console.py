"""rich's console for tables, bars and status lines, which shows foreign text as `printable` does."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ditc.runtime.printable import Stream, printable


class SafeConsole(Console):
    """A console that writes to stderr, or to stdout. Markup in foreign text has no meaning.

    rich makes its own control codes from what `render` gives, so only the text in that is escaped.
    """

    def __init__(self, *, stdout: bool = False, **settings: Any) -> None:
        stream = sys.stdout if stdout else sys.stderr
        file = stream.without_escapes() if isinstance(stream, Stream) else stream
        super().__init__(file=cast("Any", file), markup=False, highlight=False, **settings)

    def on_broken_pipe(self) -> None:
        """Leave the error to the caller, as for every other stream. rich ends the program with the exit code 1."""
        raise  # rich calls this in an except clause

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What rich writes for an object, with printable text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
