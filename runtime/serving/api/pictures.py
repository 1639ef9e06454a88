"""Pictures that requests for pictures begin with: from the files of a form, or from data URLs in a JSON body.

OpenAI's masks, and its pictures without a mask, are transparent where to draw anew. A mask without transparency is read
as diffusers reads one: white is drawn anew. Every other picture is seen on white where it is transparent.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType

from PIL import Image, ImageOps

from ditc.runtime.image_input import given_images
from ditc.runtime.serving.api.api import Api
from ditc.runtime.serving.api.asked import Asked
from ditc.runtime.serving.api.schemas import ControlArguments, EditArguments
from ditc.runtime.serving.api.uploads import Upload
from ditc.runtime.serving.refusals import Invalid

# The picture to draw from, its mask, and what a ControlNet reads: the names in forms and bodies.
IMAGE, MASK, CONTROL = "image", "mask", "control_image"
PICTURES = (IMAGE, MASK, CONTROL)
OPAQUE = 255


async def with_pictures(
    api: Api,
    asked: Asked,
    body: ControlArguments,
    held: ExitStack,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> Asked:
    """What is asked for, with the pictures in the files of a form, or in data URLs in the body.

    Arguments without their picture, such as a strength, are refused by `Pipeline`.

    Args:
        held: as in `Api.decoded`.

    Raises:
        Invalid: a picture is not a data URL, is damaged or has too many pixels, or a mask came without a picture.
        Overloaded: the memory for pictures has no room for them (`--max-picture-bytes`).
    """
    urls: dict[str, str] = {name: url for name in PICTURES if (url := getattr(body, name, None)) is not None}
    pictures = await api.decoded({**urls, **files}, held)
    image, mask, control = (pictures.get(name) for name in PICTURES)
    if mask is not None and image is None:
        raise Invalid(
            "image is required, because there is a mask",
            hint="send the picture that the mask is for",
            param=IMAGE,
            code="missing_required_parameter",
        )
    request = replace(
        asked.request,
        image=image and given_images(IMAGE, image.image, channels=3),
        mask_image=image and _to_draw(image, mask),
        strength=body.strength if isinstance(body, EditArguments) else None,
        control_image=control and given_images(CONTROL, control.image, channels=3),
        **{name: getattr(body, name) for name in ControlArguments.model_fields},
    )
    return replace(asked, request=request)


def _to_draw(image: Upload, mask: Upload | None) -> Image.Image | None:
    """Where to draw, as white in a picture of grey; None for everywhere.

    A picture without a mask is drawn anew where it is less than half opaque. If no part of it is, because it has only
    soft edges or shadows, it is drawn anew everywhere.
    """
    if mask is None:
        if image.alpha is None or not any(image.alpha.histogram()[: OPAQUE // 2 + 1]):
            return None
        return ImageOps.invert(image.alpha)
    return mask.image.convert("L") if mask.alpha is None else ImageOps.invert(mask.alpha)
