"""Image-to-image and inpainting in parity: what is drawn, from which picture, and with how many steps."""

from __future__ import annotations

from enum import StrEnum

from PIL import Image, ImageDraw

# Few steps are enough: what is tested is where the loop begins and what inpainting puts back. The first step is left
# out, and three steps are done, so that samplers which remember a step use their memory.
STEPS = 4
STRENGTH = 0.75


class Edit(StrEnum):
    """What a case does with the example picture (`ditc.runtime.control.example_picture`)."""

    IMAGE_TO_IMAGE = "image-to-image"
    INPAINTING = "inpainting"


def example_mask() -> Image.Image:
    """A mask for comparisons: a white ellipse, which is drawn anew, in the upper left of a black square."""
    mask = Image.new("L", (256, 256))
    ImageDraw.Draw(mask).ellipse((16, 16, 180, 150), fill=255)
    return mask
