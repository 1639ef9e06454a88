"""Puts pictures into the states before the first step: image-to-image, inpainting, image-to-video and ControlNet.

The arithmetic of image-to-image and inpainting is in image_start.py. Image-to-video is that of diffusers' pipelines
(0.42.1): the mode of the encoder's posterior is the first latent frame, which every step holds.
"""

# B pictures of a state, C latent channels, F latent frames, h/w latent cells

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ditc.runtime.control import control_feeds
from ditc.runtime.image_input import GivenImages
from ditc.runtime.image_start import ImageLatents, Kept, cell_mask
from ditc.runtime.noise import AfterFirstFrame, Parts, noise_parts
from ditc.runtime.rng import Generator
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.state import DenoiseState
from ditc.runtime.step_contract import HELD, NOISE

if TYPE_CHECKING:
    from ditc.runtime.prepare import Drawable, Plan


def image_latents(
    plan: Plan,
    drawable: Drawable,
    shape: tuple[int, ...],
    images: GivenImages | None,
    generator: Generator | Sequence[Generator] | None,
) -> ImageLatents | None:
    """The latents of a request's images; None without images.

    Args:
        shape: that of the latents of all pictures.
        generator: of the noise of a sampled posterior. The first frame of a video is the posterior's mode.
    """
    if images is None:
        return None
    assert drawable.encoder is not None  # as the plan has checked
    return ImageLatents(
        drawable.encoder,
        images,
        shape,
        None if plan.holds_first_frame else generator,
        per_prompt=plan.request.num_images_per_prompt,
        scale=drawable.manifest.latents.scale_factor,
        tiling=drawable.tiling,
    )


def with_image(
    state: DenoiseState, plan: Plan, drawable: Drawable, pictures: range, images: ImageLatents
) -> DenoiseState:
    """The state of pictures that start from images: the state of noise, with the images in it.

    The latents of the given state are the noise, times init_noise_sigma.
    """
    if plan.holds_first_frame:
        return _with_first_frame(state, images)
    request, table = plan.request, plan.table
    noise = np.asarray(state.latents) / np.float32(table.init_noise_sigma)
    encoded = images.take(len(pictures))
    signal, level = table.levels[0]
    kept = None
    if request.mask_image is not None:
        scale, size = drawable.manifest.latents.scale_factor, (plan.drawn_height, plan.drawn_width)
        masks, per_prompt = request.mask_image, request.num_images_per_prompt
        indices = [picture // per_prompt if len(masks) > 1 else 0 for picture in pictures]
        made = {index: cell_mask(masks, index, size, scale) for index in set(indices)}
        mask = np.concatenate([made[index] for index in indices])
        kept = Kept(mask=mask, image_latents=encoded, noise=noise, levels=table.levels)
    return replace(state, latents=signal * encoded + level * noise, kept=kept)


def _with_first_frame(state: DenoiseState, images: ImageLatents) -> DenoiseState:
    """The state of videos (B,C,F,h,w) that start from images: each is the first frame, and stays as it is."""
    latents = np.array(to_numpy(state.latents))
    latents[:, :, 0] = images.take(len(latents))
    held = first_frame_held(latents.shape)
    return replace(state, latents=latents, schedule=tuple({**step, HELD: held} for step in state.schedule))


def first_frame_held(shape: Sequence[int]) -> Array:
    """The input `held` (B,F) of steps that hold the first frame of latents of this shape, (B,C,F,h,w)."""
    held = np.zeros((shape[0], shape[2]), np.float32)
    held[:, 0] = 1
    return held


def with_control(state: DenoiseState, plan: Plan, controls: ImageLatents | None) -> DenoiseState:
    """The state with the inputs that a ControlNet takes besides those of the denoiser."""
    shape = tuple(state.latents.shape)
    latents = np.zeros(shape, np.float32) if controls is None else controls.take(shape[0])
    feeds = control_feeds(plan.control, latents, len(state.schedule))
    schedule = tuple({**step, **more} for step, more in zip(state.schedule, feeds, strict=True))
    return replace(state, schedule=schedule)


def noise_of_runs(
    plan: Plan, draws: bool, shape: tuple[int, ...], generator: Generator | Sequence[Generator]
) -> list[dict[str, Parts]]:
    """The fresh noise of each run of the network, for samplers that take it.

    It continues the stream of the starting latents, run after run, each for all pictures together, as in diffusers. A
    frame that is held gets none: diffusers steps the others alone.

    Args:
        draws: whether the sampler takes noise.
        shape: that of the latents of all pictures.
    """
    if not draws:
        return [{} for _ in range(len(plan.table))]
    if not plan.holds_first_frame:
        return [{NOISE: noise_parts(shape, generator)} for _ in range(len(plan.table))]
    others = (*shape[:2], shape[2] - 1, *shape[3:])
    return [{NOISE: AfterFirstFrame(noise_parts(others, generator))} for _ in range(len(plan.table))]
