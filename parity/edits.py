"""Cases of parity that start from a picture: what is drawn, from which picture, and with how many steps."""

from __future__ import annotations

from enum import StrEnum

from PIL import Image, ImageDraw

# Few steps are enough: what is tested is where the loop begins, what inpainting puts back, and which frame is held. For
# pictures, the first step is left out and three are done, so that samplers which remember a step use their memory.
STEPS = 4
STRENGTH = 0.75


class Edit(StrEnum):
    """What a case does with the example picture (`ditc.runtime.control.example_picture`)."""

    IMAGE_TO_IMAGE = "image-to-image"
    INPAINTING = "inpainting"
    IMAGE_TO_VIDEO = "image-to-video"


OF_PICTURES = (Edit.IMAGE_TO_IMAGE, Edit.INPAINTING)
OF_VIDEOS = (Edit.IMAGE_TO_VIDEO,)  # the picture is the first frame


def example_mask() -> Image.Image:
    """A mask for comparisons: a white ellipse, which is drawn anew, in the upper left of a black square."""
    mask = Image.new("L", (256, 256))
    ImageDraw.Draw(mask).ellipse((16, 16, 180, 150), fill=255)
    return mask
