"""The sheet of pictures that `make demo` draws."""

from __future__ import annotations

import numpy as np

from demo.draw import contact_sheet


def test_a_long_label_goes_on_in_a_second_line() -> None:
    label = "ghost, 3d style, on a blue background"
    picture = np.ones((8, 8, 3), np.float32)
    long, short = (contact_sheet([("demo", [picture])], [text]) for text in (label, label[:21]))
    assert np.asarray(long)[:, 140:].min() == 255  # nothing is cut off at the right of the cell
    assert (
        np.array_equal(np.asarray(long)[:176], np.asarray(short)[:176]) and long.tobytes() != short.tobytes()
    )
