"""Rows of texts as lines with columns of equal width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def aligned(rows: Iterable[list[str]]) -> Iterator[str]:
    """The lines. The first column is on the left, the others are on the right."""
    table = list(rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
