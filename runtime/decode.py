"""Decodes finished latents to pictures, in the form that a request asked for."""

# B samples, C latent channels, h/w latent size, H/W pixels

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ditc.runtime.bundle.manifest import Tiling
from ditc.runtime.errors import NumericsError
from ditc.runtime.images import is_uniform, resize_and_crop, to_pil, to_uint8, to_unit_range
from ditc.runtime.prepare import Plan
from ditc.runtime.session import Array, Session, Tensor, to_numpy
from ditc.runtime.spec import VAE_DECODER
from ditc.runtime.vae import decode_tiled

log = logging.getLogger(__name__)


def decode_sample(
    session: Session, latents_1Chw: Tensor, plan: Plan, *, scale: int, tiling: Tiling | None
) -> Array:
    """One picture (1,3,H,W) in the requested size, with the nominal range [-1,1].

    Args:
        session: the vae_decoder.
        scale: pixels per latent cell.
        tiling: None decodes in one piece, as does a picture that fits into one tile.

    Raises:
        NumericsError: the decoder returned NaN or Inf.
    """

    def decode_one(latents: Tensor) -> Array:
        (image,) = session.run({session.spec.inputs[0].name: latents}).values()
        return to_numpy(image)

    if tiling is None or max(latents_1Chw.shape[2:]) * scale <= tiling.tile:
        image = decode_one(latents_1Chw)  # without to_numpy, so that latents on a device stay there
    else:
        latents = to_numpy(latents_1Chw)
        image = decode_tiled(decode_one, latents, tile=tiling.tile, stride=tiling.stride, scale=scale)
    if not np.isfinite(image).all():
        raise NumericsError(
            f"{VAE_DECODER}: the picture has NaN or Inf", hint="rebuild this stage in bf16 or fp32"
        )
    if image.shape[2:] != (plan.height, plan.width):
        image = resize_and_crop(image, plan.height, plan.width)
    return image


def as_requested(pictures: Sequence[Array], plan: Plan) -> Any:
    """The decoded pictures as PIL images, or as floats (B,H,W,3) in [0,1].

    Raises:
        NumericsError: a picture has only one colour, and the request does not allow that.
    """
    for index, picture in enumerate(pictures):
        if is_uniform(to_uint8(picture)):
            message = f"picture {index} has one colour only"
            if not plan.request.allow_uniform:
                raise NumericsError(
                    message,
                    hint="this is almost always a defect; pass allow_uniform=True to keep the picture",
                )
            log.warning("%s", message)
    if plan.request.output_type == "np":
        return np.concatenate([to_unit_range(picture) for picture in pictures])
    return [image for picture in pictures for image in to_pil(to_uint8(picture))]
