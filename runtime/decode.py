"""Decodes finished latents to pictures, in the form that a request asked for."""

# B samples, C latent channels, h/w latent size, H/W pixels

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditc.runtime.bundle.manifest import Tiling
from ditc.runtime.errors import NumericsError
from ditc.runtime.failure import Failure, named
from ditc.runtime.images import is_uniform, resize_and_crop, to_pil, to_uint8, to_unit_range
from ditc.runtime.prepare import Plan
from ditc.runtime.session import Array, Session, Tensor, samples, to_numpy
from ditc.runtime.spec import VAE_DECODER
from ditc.runtime.state import DenoiseState
from ditc.runtime.vae import decode_tiled
from ditc.runtime.video import decode_video

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


@dataclass(frozen=True, slots=True)
class Decoded:
    """Some pictures of a request in the form that it asked for, and why others failed.

    Attributes:
        pictures: PIL images, floats (1,H,W,3) in [0,1] or latents (1,C,h,w). None in the place of one that failed. A
            video is a list of PIL images, floats (1,F,H,W,3) or latents (1,C,f,h,w).
        failures: in the order of the pictures.
    """

    pictures: list[Any]
    failures: list[Failure]


def decode_state(
    session: Session,
    state: DenoiseState,
    plan: Plan,
    *,
    first: int,
    scale: int,
    tiling: Tiling | None,
    following: Session | None = None,
) -> Decoded:
    """Decode every picture of a state. A picture that fails does not end the others.

    Args:
        session, scale, tiling: as in `decode_sample`.
        first: the index of the state's first picture in the request.
        following: the stage that decodes the later latent frames of a video; None for pictures, and for videos that are
            decoded as a whole.
    """
    decoded = Decoded([], [])
    failed = {failure.index: failure for failure in state.failures}
    for sample, latents in enumerate(samples(state.result)):
        index, picture, failure = first + sample, None, failed.get(sample)
        if failure is None and plan.request.output_type == "latent":
            picture = to_numpy(latents)
        elif failure is None:
            try:
                if plan.frames is not None:
                    picture = _video(session, following, latents, index, plan, tiling=tiling, scale=scale)
                else:
                    raw = decode_sample(session, latents, plan, scale=scale, tiling=tiling)
                    check_colours(is_uniform(to_uint8(raw)), index, plan)
                    picture = _as_requested(raw, plan)
            except NumericsError as error:
                failure = Failure(index=index, reason=str(error), hint=error.hint)
        if failure is not None:
            decoded.failures.append(named(failure, index, plan.request))
        decoded.pictures.append(picture)
    return decoded


def _video(
    first: Session,
    following: Session | None,
    latents: Tensor,
    index: int,
    plan: Plan,
    *,
    tiling: Tiling | None,
    scale: int,
) -> Any:
    video, uniform = decode_video(
        first,
        following,
        latents,
        height=plan.height,
        width=plan.width,
        as_pil=plan.request.output_type == "pil",
        tiling=tiling,
        scale=scale,
    )
    check_colours(uniform, index, plan)
    return video


def _as_requested(picture: Array, plan: Plan) -> Any:
    return to_pil(to_uint8(picture))[0] if plan.request.output_type == "pil" else to_unit_range(picture)


def join(pictures: Sequence[Any], plan: Plan) -> Any:
    """All pictures of a request: a list of PIL images, or one array, in which a picture that failed is all NaN.

    Args:
        pictures: those of `Decoded`, of which at least one has not failed.
    """
    if plan.request.output_type == "pil":
        return list(pictures)
    example = next(picture for picture in pictures if picture is not None)
    return np.concatenate([np.full_like(example, np.nan) if one is None else one for one in pictures])


def check_colours(uniform: bool, index: int, plan: Plan) -> None:
    """Raise NumericsError for a picture of one colour, or warn about it if the request allows such pictures."""
    what = "picture" if plan.frames is None else "video"
    if uniform and not plan.request.allow_uniform:
        raise NumericsError(
            f"{VAE_DECODER}: the {what} has one colour only",
            hint=f"this is almost always a defect; pass allow_uniform=True (--allow-uniform) to keep the {what}",
        )
    if uniform:
        log.warning("%s %d has one colour only", what, index)
