"""Control pictures for calibration: white outlines on black, as edge detectors leave them, other ones for every prompt.

ditc has no network that makes control pictures, and calibration has no pictures that its prompts would fit. What ranges
need is that the ControlNet acts as in use: a mostly black picture with thin bright lines, empty regions and corners.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SIDE = 512
# What ranges say about the control pictures that they were measured with.
PATTERN = "seeded outlines"


def outlines(seed: int) -> Image.Image:
    """A picture of outlines, which is the same for the same seed: rings, boxes and polygons, some on the others."""
    numbers = np.random.default_rng(seed)
    picture = Image.new("RGB", (SIDE, SIDE))
    pen = ImageDraw.Draw(picture)
    for kind in numbers.integers(0, 3, 3 + int(numbers.integers(0, 6))):
        x, y = numbers.integers(0, SIDE, 2).tolist()
        radius, width = int(numbers.integers(SIDE // 16, SIDE // 3)), int(numbers.integers(2, 7))
        box = (x - radius, y - radius, x + radius, y + radius)
        if kind == 0:
            pen.ellipse(box, outline="white", width=width)
        elif kind == 1:
            pen.rectangle(box, outline="white", width=width)
        else:
            corners = np.array((x, y)) + numbers.integers(-radius, radius, (int(numbers.integers(3, 8)), 2))
            pen.line([tuple(corner) for corner in [*corners.tolist(), corners[0].tolist()]], "white", width)
    return picture


def control_of(number: int, seed: int, *, always: bool) -> Image.Image | None:
    """The control picture of a prompt: one for every second prompt, so that the ranges hold without control too.

    Args:
        number: the prompt's, counted from 0 over all shards.
        seed: of its noise.
        always: give every prompt one, as for layers of the ControlNet, which does not run without.
    """
    return outlines(seed) if always or number % 2 == 0 else None
