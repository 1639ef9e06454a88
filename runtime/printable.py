r"""Foreign text on a terminal: names from bundles, checkpoints, prompts and paths are shown, and control nothing.

    printable(text)          control characters as escapes such as \x1b; line ends and tabs stay
    one_line(text)           the same, with line ends as escapes, so that no text can pose as a line of ditc's own
    printable_streams()      stdout and stderr write what is printable, in any encoding

A terminal obeys control characters: they move the cursor, colour, set titles and clipboards. Marks for the direction of
text (bidi) show a name in another order than it is stored, and some characters are invisible.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# C0 and C1 controls, marks and overrides of direction, separators of lines, invisible characters and tags, and
# surrogates, which stand for bytes that are not UTF-8. Joiners stay, as emoji and several scripts need them.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with all characters escaped that control a terminal, except line ends and tabs."""
    return _UNPRINTABLE.sub(lambda match: _escape(match[0]), text)


def one_line(text: str) -> str:
    """The printable text with its line ends escaped too."""
    return printable(text).replace("\n", r"\n")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class Stream:
    """A text stream that writes what its encoding lacks as escapes.

    Args:
        escape: also write `printable` text. rich's own control codes need a stream without it.
        optional: ignore that the stream cannot be written to, as for progress and warnings: the work goes on.
    """

    def __init__(self, raw: TextIO, *, escape: bool = True, optional: bool = False) -> None:
        self.raw, self._escape, self._optional = raw, escape, optional
        self._error: OSError | None = None

    def write(self, text: str) -> int:
        """Write the text. Returns the number of its characters, whatever became of them."""
        # A progress bar begins with a carriage return, which is harmless at the beginning of a line.
        start, rest = ("\r", text[1:]) if text.startswith("\r") else ("", text)
        shown = start + printable(rest) if self._escape else text
        encoding = getattr(self.raw, "encoding", None)
        if encoding:
            shown = shown.encode(encoding, "backslashreplace").decode(encoding)
        with self._failing():
            self.raw.write(shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write all texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered, and raise the error of an earlier write, which argparse ignores."""
        with self._failing():
            if self._error is not None:
                raise self._error
            self.raw.flush()

    def without_escapes(self) -> Stream:
        """The same stream for text that is printable already."""
        return Stream(self.raw, escape=False, optional=self._optional)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            self._error = e
            discard(self.raw)
            if not self._optional:
                raise


def discard(stream: TextIO) -> None:
    """Send what is still buffered nowhere; otherwise Python fails once more when it exits, with the exit code 120."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123 (not a path)
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def printable_streams() -> Iterator[None]:
    """Make stdout and stderr streams that write printable text only.

    A stream that was closed when Python started is None. Its descriptor would be given to the next file that is opened,
    into which libraries would then print, so it is opened on nothing.
    """
    before: tuple[TextIO | None, TextIO | None] = sys.stdout, sys.stderr
    if None in before:
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    out, err = (io.StringIO() if stream is None else stream for stream in before)
    sys.stdout, sys.stderr = cast("TextIO", Stream(out)), cast("TextIO", Stream(err, optional=True))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = cast("tuple[TextIO, TextIO]", before)
