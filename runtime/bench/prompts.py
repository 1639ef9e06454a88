"""Texts for the pictures of a benchmark. Every one is used once, so that its encoding is never cached."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from ditc.runtime.errors import UsageError

_THINGS = ("heart", "house", "tree", "cat", "boat", "flower", "mountain", "bicycle", "lamp", "bird", "castle")
_COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "violet", "golden")
_STYLES = ("flat style", "watercolour", "pencil drawing", "oil painting", "photograph at night")


class Prompts:
    """New texts, a given number at a time.

    Args:
        texts: the texts of a file; empty makes some up.
        needed: how many will be taken.

    Raises:
        UsageError: there are too few different texts.
    """

    def __init__(self, texts: Sequence[str], needed: int) -> None:
        different = list(dict.fromkeys(texts))
        if different and len(different) < needed:
            raise UsageError(
                f"{len(different)} different prompts are too few: {needed} pictures are drawn, each with a new one",
                hint="add prompts to the file, lower --repeats or --batch, or leave --prompts out",
            )
        self._next: Iterator[str] = iter(different) if different else _made_up()

    def take(self, count: int) -> list[str]:
        """The next texts."""
        return list(itertools.islice(self._next, count))


def _made_up() -> Iterator[str]:
    """Texts of about equal length without end: a number makes each of them new."""
    kinds = itertools.cycle(itertools.product(_STYLES, _THINGS, _COLOURS))
    for number, (style, thing, colour) in enumerate(kinds, start=1):
        yield f"a {colour} {thing} in the middle, {style}, number {number}"
