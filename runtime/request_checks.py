"""What no bundle can draw: a request's arguments are checked, and brought into ditc's own types."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np

from ditc.runtime.arrays import given_array
from ditc.runtime.errors import UsageError
from ditc.runtime.image_input import GivenImages, given_images
from ditc.runtime.limits import LARGEST_NUMBER, MAX_FRAMES, MAX_PICTURES, MAX_SIDE, MAX_STEPS
from ditc.runtime.request import EMBEDS, INTEGERS, NUMBERS, Request
from ditc.runtime.rng import Generator, TorchGenerator, is_torch_generator


def checked(request: Request) -> Request:
    """The request with numbers and arrays in ditc's own types. What no bundle can draw is refused.

    Raises:
        UsageError: the message names the argument and its value.
    """
    _check(request)
    # Arithmetic with an int8 would wrap, and a tensor with one number cannot do what a float can.
    changes: dict[str, Any] = {
        name: kind(getattr(request, name))
        for names, kind in ((NUMBERS, float), (INTEGERS, operator.index))
        for name in names
        if _given(request, name)
    }
    for name in (
        f"{sign}{name}" for sign in ("", "negative_") for name in EMBEDS if _given(request, sign + name)
    ):
        changes[name] = given_array(
            name, getattr(request, name), hint="pass an array with one row per prompt"
        )
        if name.endswith("attention_mask") and not np.isin(changes[name], (0, 1)).all():
            raise UsageError(
                f"{name} has values other than 0 and 1", hint="pass 1 for tokens and 0 for padding"
            )
    for name, channels in (("image", 3), ("mask_image", 1), ("control_image", 3)):
        given = getattr(request, name)
        if given is not None and not isinstance(given, GivenImages):
            changes[name] = _one_per_prompt(request, name, given_images(name, given, channels=channels))
    if request.guidance_interval is not None:
        changes["guidance_interval"] = tuple(map(float, request.guidance_interval))
    return replace(request, **changes, generator=_own_generator(request.generator))


def _one_per_prompt(request: Request, name: str, images: GivenImages) -> GivenImages:
    if len(images) not in (1, request.num_prompts):
        raise UsageError(
            f"{name} holds {len(images)} pictures for {request.num_prompts} prompts",
            hint="pass one picture for all prompts, or one per prompt",
        )
    return images


def _given(request: Request, name: str) -> bool:
    value = getattr(request, name)
    return value is not None and not (name == "intermediate_timesteps" and value is False)


def _check(request: Request) -> None:
    if (request.prompt is None) == (request.prompt_embeds is None):
        raise UsageError("give exactly one of prompt and prompt_embeds", hint="pass a text as prompt")
    _check_numbers(request)
    _check_schedule(request)
    _check_interval(request)
    _check_arrays(request)
    _check_texts("prompt", request.prompt)
    _check_texts("negative_prompt", request.negative_prompt)
    further = request.further_texts(negative=False) | request.further_texts(negative=True)
    for name, texts in further.items():
        _check_texts(name, texts)
    if request.num_prompts == 0:
        raise UsageError(
            "the list of prompts is empty", hint="pass at least one text; an empty text is allowed"
        )
    if len(request.negative_prompts) != request.num_prompts:
        raise UsageError(
            f"there are {len(request.negative_prompts)} negative prompts for {request.num_prompts} prompts",
            hint="pass one negative_prompt for all prompts, or one per prompt",
        )
    for name, texts in further.items():
        if texts and not isinstance(texts, str) and len(texts) != request.num_prompts:
            raise UsageError(
                f"{name} holds {len(texts)} texts for {request.num_prompts} prompts",
                hint="pass one text for all prompts, or one per prompt",
            )
    _check_embeds(request)
    _check_counts(request)
    _check_image(request)
    _check_control(request)
    if request.seed is not None and request.generator is not None:
        raise UsageError("seed and generator are both given", hint="pass only one of them")
    if not isinstance(request.output_type, str) or request.output_type not in ("pil", "np", "latent"):
        hint = 'pass "pil", "np" or "latent"'
        if str(request.output_type) == "pt":
            hint = 'pass "np" and convert the images: torch.from_numpy(images).permute(0, 3, 1, 2)'
        raise UsageError(f"output_type is {request.output_type!r}", hint=hint)
    _check_lists(request)


def _check_numbers(request: Request) -> None:
    for name in (*INTEGERS, *NUMBERS):
        value = getattr(request, name)
        if not _given(request, name) and getattr(Request, name) is None:  # the class holds the defaults
            continue
        try:
            fits = math.isfinite(value) if name in NUMBERS else operator.index(value) is not None
        except (TypeError, ValueError):
            fits = False
        if not fits:
            kind = "a finite" if name in NUMBERS else "a whole"
            raise UsageError(f"{name} is {value!r:.80}", hint=f"pass {kind} number, or leave it out")


def _check_counts(request: Request) -> None:
    for name, least, most in (
        ("num_inference_steps", 1, MAX_STEPS),
        ("num_images_per_prompt", 1, MAX_PICTURES),
        ("frames", 1, MAX_FRAMES),
        ("motion_score", 0, LARGEST_NUMBER),
    ):
        count = getattr(request, name)
        if count is not None and not least <= count <= most:
            raise UsageError(f"{name} is {count}", hint=f"pass {least} to {most}")
    for name in ("height", "width"):
        pixels = getattr(request, name)
        if pixels is not None and not 1 <= pixels <= MAX_SIDE:
            raise UsageError(
                f"{name} is {pixels} pixels",
                hint=f"pass 1 to {MAX_SIDE}, or leave it out for the bundle's default",
            )
    if request.num_pictures > MAX_PICTURES:
        raise UsageError(
            f"{request.num_prompts} prompts x {request.num_images_per_prompt} pictures are {request.num_pictures} "
            "pictures",
            hint=f"draw at most {MAX_PICTURES} in one request",
        )


def _check_image(request: Request) -> None:
    if request.image is None:
        for name in ("mask_image", "strength"):
            if getattr(request, name) is not None:
                raise UsageError(f"{name} is given without an image", hint="pass the picture as image")
        return
    if request.strength is not None and not 0 <= request.strength <= 1:
        raise UsageError(f"strength is {request.strength:g}", hint="pass a number from 0 to 1")


def _check_control(request: Request) -> None:
    settings = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    given = {name: getattr(request, name) for name in settings if getattr(request, name) is not None}
    if request.control_image is None:
        for name in given:
            raise UsageError(
                f"{name} is given without a control_image", hint="pass the control picture as control_image"
            )
    start, end = given.get(settings[1], 0.0), given.get(settings[2], 1.0)
    if not 0 <= start < end <= 1:
        raise UsageError(
            f"control_guidance_start is {start:g} and control_guidance_end is {end:g}",
            hint="pass fractions of the steps, 0 to 1, with the start before the end",
        )


def _check_schedule(request: Request) -> None:
    for name in ("timesteps", "sigmas"):
        values = getattr(request, name)
        if values is None:
            continue
        try:
            fits = 0 < len(values) <= MAX_STEPS and all(math.isfinite(value) for value in values)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise UsageError(
                f"{name} is {values!r:.80}",
                hint=f"pass a list of 1 to {MAX_STEPS} finite numbers, one per step",
            )


def _check_interval(request: Request) -> None:
    interval = request.guidance_interval
    if interval is None:
        return
    try:
        fits = len(interval) == 2 and all(math.isfinite(end) for end in interval)
        fits = fits and 0 <= float(interval[0]) < float(interval[1]) <= 1
    except (TypeError, ValueError, LookupError):
        fits = False
    if not fits:
        raise UsageError(
            f"guidance_interval is {interval!r:.80}",
            hint="pass two numbers from 0 to 1, the first one smaller, such as (0.2, 0.8)",
        )


def _check_arrays(request: Request) -> None:
    for negative in (False, True):
        for name, array in request.embeds(negative=negative).items():
            if not getattr(array, "ndim", 0):
                raise UsageError(
                    f"{'negative_' if negative else ''}{name} is {array!r:.80}",
                    hint="pass a numpy array with one row per prompt",
                )


def _check_texts(name: str, texts: object) -> None:
    if texts is None or isinstance(texts, str):
        return
    if isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts):
        return
    hint = "pass a str or a list of str"
    if isinstance(texts, bytes | bytearray):
        hint = f"pass a str: {name}.decode()"
    elif isinstance(texts, Iterable) and not isinstance(texts, Sequence):
        hint = f"pass a list of str: list({name})"
    raise UsageError(f"{name} must be text, got {texts!r:.80}", hint=hint)


def _check_lists(request: Request) -> None:
    lines, layers = request.complex_human_instruction, request.skip_guidance_layers
    if lines is not None and (isinstance(lines, str) or not _all_of(lines, str)):
        raise UsageError(f"complex_human_instruction is {lines!r:.80}", hint="pass a list of lines of text")
    if layers is not None and not _all_of(layers, Integral):
        raise UsageError(f"skip_guidance_layers is {layers!r:.80}", hint="pass a list of numbers of layers")


def _all_of(values: object, kind: type) -> bool:
    return isinstance(values, Sequence) and all(isinstance(value, kind) for value in values)


def _own_generator(given: Any) -> Generator | Sequence[Generator] | None:
    """The generator, or one per picture. Those of torch are wrapped."""
    if given is None or isinstance(given, Generator):
        return given
    if is_torch_generator(given):
        return TorchGenerator(given)
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        own = [_own_generator(one) for one in given]
        if all(isinstance(one, Generator) for one in own):
            return own  # type: ignore[return-value]
    raise UsageError(
        f"generator is {given!r:.80}",
        hint="pass seed, a torch.Generator, or ditc.runtime.Generator(seed), which draws what torch's CPU generator "
        "draws; or a list with one of these generators per picture",
    )


def _check_embeds(request: Request) -> None:
    for negative in (False, True):
        given = request.embeds(negative=negative)
        sign = "negative_" if negative else ""
        for name, array in given.items():
            if array.shape[0] != request.num_prompts:
                raise UsageError(
                    f"{sign}{name} has {array.shape[0]} rows for {request.num_prompts} prompts",
                    hint="pass one row per prompt",
                )
        further = [name for name, texts in request.further_texts(negative=negative).items() if texts]
        if given and further:
            raise UsageError(
                f"{further[0]} and {sign}{next(iter(given))} are both given",
                hint="pass either texts or embeddings",
            )
        if given and negative and any(request.negative_prompts):
            raise UsageError(
                f"negative_prompt and negative_{next(iter(given))} are both given",
                hint="pass either texts or embeddings",
            )
        embeds, mask = given.get("prompt_embeds"), given.get("prompt_attention_mask")
        if embeds is None:
            continue
        if embeds.ndim != 3 or (mask is not None and embeds.shape[:2] != mask.shape):
            beside = "" if mask is None else f", and {sign}prompt_attention_mask has {tuple(mask.shape)}"
            raise UsageError(
                f"{sign}prompt_embeds has shape {tuple(embeds.shape)}{beside}",
                hint="pass embeds of shape (prompts, tokens, channels) and a mask of shape (prompts, tokens)",
            )
    own, other = request.prompt_embeds, request.negative_prompt_embeds
    if own is not None and other is not None and own.shape[1] != other.shape[1]:
        raise UsageError(
            f"prompt_embeds have {own.shape[1]} tokens, but negative_prompt_embeds {other.shape[1]}: different lengths",
            hint="pad or cut both, and their masks, to the same number of tokens",
        )
