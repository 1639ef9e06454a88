"""The parser of the command line. A line that does not parse is a UsageError, whose hint says what was meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

from ditc.runtime.errors import UsageError

_UNKNOWN = re.compile(r"unrecognized arguments: (.+)", re.DOTALL)
_CHOICE = re.compile(r"argument .+?: invalid choice: '(.*)' \(choose from (.+)\)", re.DOTALL)


class CommandParser(argparse.ArgumentParser):
    """A parser that raises UsageError, like every other part of ditc.

    Attributes:
        verbs: the parsers of the verbs, in the top-level parser. Only the parser of the typed verb gets its arguments.
    """

    verbs: dict[str, CommandParser]

    def __init__(self, **settings: Any) -> None:
        super().__init__(add_help=False, **settings)
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=" ".join((*self._meant(message), f"{self.prog} --help")))

    def _meant(self, message: str) -> Iterator[str]:
        """What the user probably wanted to write, in words."""
        if found := _CHOICE.fullmatch(message):
            yield from _did_you_mean(found[1], re.findall(r"'([^']*)'", found[2]))
        elif found := _UNKNOWN.fullmatch(message):
            words = found[1].split(" ")
            options = [word for word in words if word.startswith("-")]
            known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
            for option in options:
                if option.startswith("--"):  # everything is near to one letter
                    yield from _did_you_mean(option[2:].partition("=")[0], known, "--")
            if not options:
                yield "put a text of several words in quotes;"


def _did_you_mean(word: str, known: Iterable[str], before: str = "") -> Iterator[str]:
    near = get_close_matches(word, list(known), n=2)
    if near:
        yield f"did you mean {' or '.join(before + name for name in near)}?"
