"""Control pictures of clients: the fields of a request, from a file of a form or from a data URL in a JSON body."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ditc.runtime.image_input import given_images
from ditc.runtime.serving.api.api import Api
from ditc.runtime.serving.api.asked import Asked
from ditc.runtime.serving.api.schemas import ControlArguments, ControlPicture
from ditc.runtime.serving.api.uploads import Upload, read_data_url

FILE = "control_image"


def control_fields(body: ControlArguments, picture: Upload | None) -> dict[str, Any]:
    """The fields of `Request` that say what control does. Arguments without a picture are refused by `Pipeline`."""
    return {
        FILE: picture and given_images(FILE, picture.whole, channels=3),
        **{name: getattr(body, name) for name in ControlArguments.model_fields},
    }


async def with_control_picture(api: Api, asked: Asked, body: ControlPicture) -> Asked:
    """What is asked for, with the control picture of the body, if it has one.

    Raises:
        Invalid: the picture is not a data URL, is damaged, or has too many pixels.
    """
    picture = None
    if body.control_image is not None:
        picture = await api.encoder.run(
            read_data_url, body.control_image, param=FILE, most_pixels=api.limits.max_pixels
        )
    return replace(asked, request=replace(asked.request, **control_fields(body, picture)))
