"""Image-to-image and inpainting by upstream: the second reference of the cases that start from a picture.

It shares no code with the runtime's image-to-image: where the loop begins, the noise of the start and the mask are
computed here with upstream's networks, schedulers and image processors.

  1. Where diffusers has a pipeline for the edit, that pipeline draws it.
  2. Where it has one for image-to-image alone, that one inpaints too: after every step, a callback puts the picture
     back outside of the mask, as diffusers' inpainting pipelines do inside of their loops.
  3. Elsewhere the text-to-image pipeline draws, from the noised picture and with a schedule without its first steps.
"""

# B samples, C latent channels, H/W latent size

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditc.parity.cases import Case, CaseRun
from ditc.parity.edits import OF_VIDEOS, STEPS, STRENGTH, Edit, example_mask
from ditc.runtime.control import example_picture
from ditc.runtime.session import Array

# The endings of the names of diffusers' pipelines.
ENDINGS = {Edit.IMAGE_TO_IMAGE: "Img2ImgPipeline", Edit.INPAINTING: "InpaintPipeline"}


def described(pipeline: Any, edit: Edit, name: str) -> str:
    """What draws the edit, for reports: upstream, or upstream with what it lacks computed here.

    Args:
        pipeline: upstream's text-to-image pipeline.
        name: of upstream.
    """
    if edit in OF_VIDEOS or _class_for(pipeline, edit):
        return name
    if _class_for(pipeline, Edit.IMAGE_TO_IMAGE):
        return f"{name}, masked by parity"
    return f"{name}, started by parity"


def draw_edit(
    pipeline: Any,
    case: Case,
    given: Mapping[str, Any],
    noise: Array,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> CaseRun:
    """Draw one case that starts from the example picture, and keep the latents after every step.

    Args:
        pipeline: upstream's text-to-image pipeline.
        given: the arguments of the settings and the checkpoint, of which each pipeline takes those that it has. The
            picture gets their `height` and `width`.
        noise: (B,C,H,W), for its shape alone: the case's seed gives the noise of an edit.
    """
    assert case.edit is not None
    complete = _class_for(pipeline, case.edit)
    kind = complete or _class_for(pipeline, Edit.IMAGE_TO_IMAGE)
    drawing = pipeline if kind is None else _of_class(kind, pipeline)
    scale = _pixels_per_cell(pipeline.vae)
    size = (noise.shape[2] * scale, noise.shape[3] * scale)
    # The random stream of upstream's pipelines: the sample of the VAE's posterior, then the noise of the start.
    stream = torch.Generator().manual_seed(case.seed)
    with torch.inference_mode():
        image = _encoded(pipeline.vae, _processor(scale).preprocess(example_picture(), *size), stream)
        image = image * _sigma_data(pipeline.scheduler)
        drawn = torch.randn(noise.shape, generator=stream) * _sigma_data(pipeline.scheduler)
        mask = None
        if case.edit is Edit.INPAINTING:
            pixels = _processor(scale, mask=True).preprocess(example_mask(), *size)
            mask = torch.nn.functional.interpolate(pixels, size=tuple(noise.shape[2:]))
        latents: list[Tensor] = []

        def after_step(_: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            after = tensors["latents"]
            if mask is not None and complete is None:
                kept = _noised(drawing.scheduler, image, drawn)
                after = (1 - mask) * kept + mask * after
            latents.append(after.float().clone())
            on_step()
            return {"latents": after}

        arguments = {
            **given,
            "num_inference_steps": STEPS,
            "height": size[0],
            "width": size[1],
            "use_resolution_binning": False,  # the size is that of the bin
            "intermediate_timesteps": None,
            "prompt": case.prompt,
            "callback_on_step_end": after_step,
            "output_type": "latent",
        }
        if kind is not None:
            arguments |= {"image": example_picture(), "mask_image": example_mask(), "strength": STRENGTH}
            arguments["generator"] = torch.Generator().manual_seed(case.seed)
            _call(drawing, arguments)
        else:
            arguments |= {"controlnet_conditioning_scale": 0.0, "generator": stream}
            with _shortened(drawing.scheduler):
                drawing.scheduler.set_timesteps(STEPS)
                arguments["latents"] = _noised(drawing.scheduler, image, drawn)
                torch.set_rng_state(
                    stream.get_state()
                )  # not every pipeline hands its generator to its scheduler
                _call(drawing, arguments)
        # diffusers 0.42.1 decodes inpainted latents without the VAE's shift_factor, so they are decoded here.
        wanted = (given.get("height", size[0]), given.get("width", size[1]))
        picture = _decoded(pipeline, latents[-1], wanted)
    return CaseRun(
        case=case,
        noise=noise,
        latents=np.stack([noise, *(step.numpy() for step in latents)]),
        picture=picture,
        mask=None if mask is None else mask.numpy(),
    )


def _class_for(pipeline: Any, edit: Edit) -> type | None:
    """diffusers' pipeline for the edit with the networks of a text-to-image pipeline; None if it has none."""
    import diffusers

    name = type(pipeline).__name__.replace("ControlNet", "")
    found = getattr(diffusers, name.removesuffix("Pipeline") + ENDINGS[edit], None)
    return found if isinstance(found, type) and type(pipeline).__module__.startswith("diffusers.") else None


def _of_class(kind: type, pipeline: Any) -> Any:
    takes = inspect.signature(kind).parameters
    made = kind(**{name: part for name, part in pipeline.components.items() if name in takes})
    made.set_progress_bar_config(disable=True)
    return made


def _call(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    takes = inspect.signature(pipeline.__call__).parameters
    pipeline(**{name: value for name, value in arguments.items() if name in takes})


def _first_step() -> int:
    """get_timesteps of diffusers' image-to-image pipelines."""
    return int(max(STEPS - min(STEPS * STRENGTH, STEPS), 0))


@contextmanager
def _shortened(scheduler: Any) -> Iterator[None]:
    """Let a pipeline leave out the first steps, as get_timesteps does in diffusers' image-to-image pipelines.

    The pipeline gets the timesteps that are left. The scheduler has all of them again when it computes a step, because
    some schedulers count them to know which step is the last one.
    """
    set_all, compute, every = scheduler.set_timesteps, scheduler.step, None

    @functools.wraps(set_all)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        nonlocal every
        set_all(*args, **kwargs)
        first, every = _first_step() * scheduler.order, scheduler.timesteps
        scheduler.timesteps = every[first:]
        scheduler.set_begin_index(first)

    @functools.wraps(compute)
    def step(*args: Any, **kwargs: Any) -> Any:
        scheduler.timesteps = every
        return compute(*args, **kwargs)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    try:
        yield
    finally:
        del scheduler.set_timesteps, scheduler.step


def _noised(scheduler: Any, image: Tensor, noise: Tensor) -> Tensor:
    """The image (B,C,H,W) at the noise level of the scheduler's next step; as it is after the last one."""
    index = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
    if _sigma_data(scheduler) != 1:  # trigonometric flow, as its image-to-image pipeline in diffusers does it
        angle = scheduler.timesteps[index]
        return torch.cos(angle) * image + torch.sin(angle) * noise
    if index >= len(scheduler.sigmas) - 1:
        return image
    step = scheduler.timesteps[:1].repeat(len(image))  # the scheduler goes by its own index
    if not hasattr(scheduler, "scale_noise"):
        return scheduler.add_noise(image, noise, step)
    if scheduler.config.get("invert_sigmas"):  # its sigmas are weights of the picture
        image, noise = noise, image
    return scheduler.scale_noise(image, step, noise)


def _sigma_data(scheduler: Any) -> float:
    """The standard deviation that the scheduler's latents have without noise, per that of the VAE's."""
    return float(scheduler.config.get("sigma_data", 1.0))


def _pixels_per_cell(vae: Any) -> int:
    blocks = vae.config.get("encoder_block_out_channels") or vae.config["block_out_channels"]
    return int(2 ** (len(blocks) - 1))


def _processor(scale: int, *, mask: bool = False) -> Any:
    from diffusers.image_processor import VaeImageProcessor

    if not mask:
        return VaeImageProcessor(vae_scale_factor=scale)
    return VaeImageProcessor(
        vae_scale_factor=scale, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )


def _encoded(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The latents (B,C,H,W) of pixels (B,3,H,W), a sample of the posterior if the VAE has one."""
    out = vae.encode(pixels.to(vae.dtype))
    latents = out.latent if hasattr(out, "latent") else out.latent_dist.sample(generator)
    shift = vae.config.get("shift_factor") or 0.0
    return ((latents - shift) * vae.config.scaling_factor).float()


def _decoded(pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Array:
    """The first picture (H,W,3) in [0,1], at the size (height, width) in pixels."""
    vae = pipeline.vae
    scaled = latents / _sigma_data(pipeline.scheduler) / vae.config.scaling_factor
    pixels = vae.decode((scaled + (vae.config.get("shift_factor") or 0.0)).to(vae.dtype)).sample
    if tuple(pixels.shape[2:]) != size:
        pixels = pipeline.image_processor.resize_and_crop_tensor(pixels, size[1], size[0])
    picture: Array = (pixels[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().numpy()
    return picture
