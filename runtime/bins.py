"""Resolution bins: the sizes a model was trained at, and which of them serves a request."""

from __future__ import annotations

from collections.abc import Sequence


def classify(height: int, width: int, bins: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of the bin whose aspect ratio is nearest; the size itself where there are no bins.

    Bins are compared by their ratio to two decimals, and the first of two equally near ones is taken: that is
    what diffusers' classify_height_width_bin (0.42.1) does, whose tables are keyed so.
    """
    if not bins:
        return height, width
    ratio = height / width
    return min(bins, key=lambda size: abs(round(size[0] / size[1], 2) - ratio))
