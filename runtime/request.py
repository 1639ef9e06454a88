"""What a caller asks for, checked before any work begins. Names and defaults are those of diffusers."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

from ditc.runtime.errors import UsageError
from ditc.runtime.rng import Generator
from ditc.runtime.session import Array

OutputType = Literal["pil", "np", "latent"]

INTEGERS = ("num_inference_steps", "height", "width", "seed", "num_images_per_prompt")
NUMBERS = (
    *("guidance_scale", "skip_layer_guidance_scale"),
    *("skip_layer_guidance_start", "skip_layer_guidance_stop"),
)
# Arguments of diffusers that are accepted only with these values, which ask for what ditc does anyway.
IMPLIED = {"return_dict": (True,), "callback_on_step_end_tensor_inputs": (["latents"], ("latents",))}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the pipeline. None means the bundle's default.

    Attributes:
        prompt: one or several texts; None if prompt_embeds are given.
        negative_prompt: one text for all prompts, or one per prompt. It is used if guidance_scale > 1.
        prompt_2, prompt_3, negative_prompt_2, negative_prompt_3: other texts for the second and third text encoder.
            An encoder without a text of its own reads the first.
        num_inference_steps, guidance_scale: apply to every picture of this request.
        height, width: the size of the pictures, in pixels.
        seed, generator: what the starting noise is drawn from. A list holds one generator per picture.
        latents: (B,C,H,W) fp32 starting latents, instead of noise.
        prompt_embeds, prompt_attention_mask, pooled_prompt_embeds, negative_*: (prompts, S, D) fp32, (prompts, S) and
            (prompts, P), instead of texts. Mask and pooled embeddings are given only if the model takes them.
        skip_layer_guidance_scale, _start, _stop: strength of the guidance away from the network with skipped layers (0
            turns it off), and the fractions of all steps between which it acts.
        use_resolution_binning: draw at the nearest trained size, then resize and crop to height and width.
        allow_uniform: keep a picture of one colour, with a warning, instead of counting it as failed.
        strict: raise an error for the first picture that fails, instead of drawing the others.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = ""
    prompt_2: str | Sequence[str] | None = None
    prompt_3: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    negative_prompt_3: str | Sequence[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    generator: Generator | Sequence[Generator] | None = None
    num_images_per_prompt: int = 1
    latents: Array | None = None
    prompt_embeds: Array | None = None
    prompt_attention_mask: Array | None = None
    negative_prompt_embeds: Array | None = None
    negative_prompt_attention_mask: Array | None = None
    pooled_prompt_embeds: Array | None = None
    negative_pooled_prompt_embeds: Array | None = None
    skip_layer_guidance_scale: float | None = None
    skip_layer_guidance_start: float | None = None
    skip_layer_guidance_stop: float | None = None
    use_resolution_binning: bool = True
    output_type: OutputType = "pil"
    allow_uniform: bool = False
    strict: bool = False

    @property
    def prompts(self) -> list[str]:
        """The texts as a list, which is empty if embeddings are given."""
        if self.prompt is None:
            return []
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    def prompt_of(self, picture: int) -> str:
        """The text of a picture, by its index; "" if embeddings are given."""
        return self.prompts[picture // self.num_images_per_prompt] if self.prompt_embeds is None else ""

    @property
    def num_prompts(self) -> int:
        return len(self.prompts) if self.prompt_embeds is None else int(self.prompt_embeds.shape[0])

    @property
    def negative_prompts(self) -> list[str]:
        """One negative text per prompt; None means the empty text."""
        return self._one_each(self.negative_prompt)

    def texts(self, encoders: int, *, negative: bool) -> list[tuple[str, ...]]:
        """Per prompt, the text that each encoder reads. An empty one stands for the first text, as in diffusers."""
        first = self.negative_prompts if negative else self.prompts
        others = [self._one_each(text) for text in self.further_texts(negative=negative).values()]
        return [
            tuple(text or columns[0] for text in columns)[:encoders]
            for columns in zip(first, *others, strict=True)
        ]

    def further_texts(self, *, negative: bool) -> dict[str, str | Sequence[str] | None]:
        """The texts for the second and third encoder, by name of the argument."""
        names = [f"{'negative_' if negative else ''}prompt_{number}" for number in (2, 3)]
        return {name: getattr(self, name) for name in names}

    def embeds(self, *, negative: bool) -> dict[str, Array]:
        """The embeddings that are given instead of texts, by name of the argument without the prefix negative_."""
        names = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
        found = {name: getattr(self, f"negative_{name}" if negative else name) for name in names}
        return {name: array for name, array in found.items() if array is not None}

    def _one_each(self, text: str | Sequence[str] | None) -> list[str]:
        if text is None or isinstance(text, str):
            return [text or ""] * self.num_prompts
        return list(text)


def make_request(**arguments: Any) -> Request:
    """A request from a caller's keyword arguments. Arguments of diffusers that change nothing are accepted too.

    Raises:
        UsageError: a request has no such argument (the hint names the most similar one), or an argument of diffusers
            has a value that is not supported.
    """
    known = [field.name for field in fields(Request)]
    for name, value in arguments.items():
        if name in IMPLIED and value not in IMPLIED[name]:
            raise UsageError(f"{name} is {value!r:.80}, but must be {IMPLIED[name][0]}", hint="leave it out")
        if name not in known and name not in IMPLIED:
            close = get_close_matches(name, known, n=1)
            raise UsageError(
                f"there is no argument {name}",
                hint=f"did you mean {close[0]}?" if close else "ditc.runtime.Request lists them",
            )
    return Request(**{name: value for name, value in arguments.items() if name not in IMPLIED})


def check_request(request: Request) -> None:
    """Refuse a request that no bundle can draw.

    Raises:
        UsageError: the message names the argument and its value.
    """
    if (request.prompt is None) == (request.prompt_embeds is None):
        raise UsageError("give exactly one of prompt and prompt_embeds", hint="pass a text as prompt")
    _check_numbers(request)
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
        if texts is not None and not isinstance(texts, str) and len(texts) != request.num_prompts:
            raise UsageError(
                f"{name} holds {len(texts)} texts for {request.num_prompts} prompts",
                hint="pass one text for all prompts, or one per prompt",
            )
    _check_embeds(request)
    if request.num_inference_steps is not None and request.num_inference_steps < 1:
        raise UsageError(f"num_inference_steps is {request.num_inference_steps}", hint="pass at least 1")
    for name, pixels in (("height", request.height), ("width", request.width)):
        if pixels is not None and pixels < 1:
            raise UsageError(f"{name} is {pixels} pixels", hint="leave it out for the bundle's default")
    if request.num_images_per_prompt < 1:
        raise UsageError(f"num_images_per_prompt is {request.num_images_per_prompt}", hint="pass at least 1")
    if request.seed is not None and request.generator is not None:
        raise UsageError("seed and generator are both given", hint="pass only one of them")
    generators = [request.generator] if isinstance(request.generator, Generator | None) else request.generator
    if not isinstance(generators, Sequence) or not all(isinstance(g, Generator | None) for g in generators):
        raise UsageError(
            f"generator is {request.generator!r:.80}",
            hint="pass ditc.runtime.Generator(seed), which draws what torch's CPU generator draws",
        )
    if request.output_type not in ("pil", "np", "latent"):
        raise UsageError(f"output_type is {request.output_type!r}", hint='pass "pil", "np" or "latent"')


def _check_numbers(request: Request) -> None:
    for name in (*INTEGERS, *NUMBERS):
        value = getattr(request, name)
        if value is None and getattr(Request, name) is None:  # the class holds the defaults
            continue
        try:
            fits = math.isfinite(value) if name in NUMBERS else operator.index(value) is not None
        except (TypeError, ValueError):
            fits = False
        if not fits:
            kind = "a finite" if name in NUMBERS else "a whole"
            raise UsageError(f"{name} is {value!r:.80}", hint=f"pass {kind} number, or leave it out")


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
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} must be text, got {texts!r:.80}", hint="pass a str or a list of str")


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
        embeds, mask = given.get("prompt_embeds"), given.get("prompt_attention_mask")
        if embeds is None:
            continue
        if embeds.ndim != 3 or (mask is not None and embeds.shape[:2] != mask.shape):
            beside = "" if mask is None else f", and {sign}prompt_attention_mask has {tuple(mask.shape)}"
            raise UsageError(
                f"{sign}prompt_embeds has shape {tuple(embeds.shape)}{beside}",
                hint="pass embeds of shape (prompts, tokens, channels) and a mask of shape (prompts, tokens)",
            )
