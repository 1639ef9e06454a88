"""PNG files that carry the settings of their picture, so that it can be drawn again, as CLI and server write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ditc.runtime.atomic import atomic_path

if TYPE_CHECKING:
    from PIL import Image

    from ditc.runtime.pipeline import Pipeline
    from ditc.runtime.prepare import Plan

# Fields of Request that a picture's settings name if they are given.
TEXTS = ("negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")
SCHEDULE = ("timesteps", "sigmas", "max_timesteps", "intermediate_timesteps", "mu")
OF_TEXTS = ("max_sequence_length", "complex_human_instruction", "motion_score")


def picture_settings(pipeline: Pipeline, plan: Plan, index: int, *, backend: str) -> dict[str, str]:
    """The PNG text chunks of one picture of a request.

    Args:
        index: the picture's place in the request. One seed draws the noise of all pictures, so it is needed to draw
            this one again.
        backend: the library that ran the denoiser, and its precision, in words.
    """
    request, skip, pag = plan.request, plan.skip_layer_guidance, plan.perturbed_attention_guidance
    image: dict[str, object] = {} if request.image is None else {"image": True}
    if image and plan.strength is not None:
        image |= {"mask_image": request.mask_image is not None, "strength": plan.strength}
    settings = {
        "num_inference_steps": plan.num_inference_steps,
        **{n: value for n in (*SCHEDULE, *OF_TEXTS) if (value := getattr(request, n)) is not None},
        **({} if request.use_resolution_binning else {"use_resolution_binning": False}),
        "guidance_scale": plan.guidance_scale,
        "skip_layer_guidance_scale": skip.scale if skip else 0,
        **({"skip_layer_guidance_start": skip.start, "skip_layer_guidance_stop": skip.stop} if skip else {}),
        **({"pag_scale": pag.scale, "pag_adaptive_scale": pag.adaptive_scale} if pag else {}),
        **({} if request.guidance_interval is None else {"guidance_interval": plan.guidance_interval}),
        "height": plan.height,
        "width": plan.width,
        **({} if plan.frames is None else {"frames": plan.frames}),
        **({"loras": loras} if (loras := pipeline.loras_in_weights()) else {}),
        "backend": backend,
        "index": index,
        **image,
        **_control_settings(plan),
        "num_prompts": request.num_prompts,
        "num_images_per_prompt": request.num_images_per_prompt,
    }
    given = {name: getattr(request, name) for name in TEXTS}
    return {
        "prompt": request.prompt_of(index),
        **{name: text for name, text in given.items() if text is not None},
        "seed": str(plan.seed),
        "settings": json.dumps(settings),
        "bundle": pipeline.manifest.digest,
        "certified": "no" if pipeline.uncertified else "yes",
        "software": _software(),
    }


def _control_settings(plan: Plan) -> dict[str, bool | float]:
    if plan.control is None:
        return {}
    return {
        "control_image": True,
        "controlnet_conditioning_scale": plan.control.scale,
        "control_guidance_start": plan.control.start,
        "control_guidance_end": plan.control.end,
    }


def write_png(picture: Image.Image, file: IO[bytes], settings: Mapping[str, str], *, effort: int = 6) -> None:
    """Write a picture with its settings.

    Args:
        effort: zlib's level, from 0 to 9. 6 is Pillow's.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in settings.items():
        info.add_itxt(name, text)
    picture.save(file, format="PNG", pnginfo=info, compress_level=effort)


def save_png(picture: Image.Image, path: Path, settings: Mapping[str, str]) -> Path:
    """Write one picture to a file, which appears whole or not at all. Raises OutputError if it cannot be written."""
    with atomic_path(path, hint="choose another -o") as partial, partial.open("wb") as file:
        write_png(picture, file, settings)
    return path


@cache
def _software() -> str:
    from ditc.runtime.machine import library_versions

    return f"ditc {library_versions().get('ditc', '')}".strip()
