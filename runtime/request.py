"""What a caller asks for, checked before any work begins. Names and defaults are diffusers'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ditc.runtime.errors import UsageError
from ditc.runtime.manifest import Defaults, LatentSpec
from ditc.runtime.rng import Generator
from ditc.runtime.session import Array
from ditc.runtime.spec import Range, StageSpec

OutputType = Literal["pil", "np", "latent"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the pipeline. None means the bundle's default.

    Attributes:
        prompt: one or several texts; None when prompt_embeds are given.
        negative_prompt: one text for all, or one a prompt; used when guidance_scale > 1.
        num_inference_steps, guidance_scale: of every picture of this request.
        height, width: pixels. seed, generator: the starting noise; a list holds one generator a picture.
        latents: (B,C,H,W) fp32 starting latents, instead of noise.
        prompt_embeds, prompt_attention_mask, negative_*: (prompts, S, D) fp32 and (prompts, S), instead of texts.
        use_resolution_binning: draw at the nearest trained size, then resize and crop to the asked one.
        allow_uniform: a picture of one colour warns instead of raising.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = ""
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
    use_resolution_binning: bool = True
    output_type: OutputType = "pil"
    allow_uniform: bool = False

    @property
    def prompts(self) -> list[str]:
        """The texts as a list; empty when embeddings are given."""
        if self.prompt is None:
            return []
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def num_prompts(self) -> int:
        return len(self.prompts) if self.prompt_embeds is None else int(self.prompt_embeds.shape[0])

    @property
    def negative_prompts(self) -> list[str]:
        """One negative text a prompt; None is the empty text."""
        if self.negative_prompt is None or isinstance(self.negative_prompt, str):
            return [self.negative_prompt or ""] * self.num_prompts
        return list(self.negative_prompt)


def check_request(request: Request) -> None:
    """Refuse what no bundle can serve.

    Raises:
        UsageError: naming the argument and its value.
    """
    if (request.prompt is None) == (request.prompt_embeds is None):
        raise UsageError("give exactly one of prompt and prompt_embeds", hint="pass a text as prompt")
    _check_texts("prompt", request.prompt)
    _check_texts("negative_prompt", request.negative_prompt)
    if request.num_prompts == 0:
        raise UsageError(
            "the list of prompts is empty", hint="pass at least one text; an empty text is allowed"
        )
    if len(request.negative_prompts) != request.num_prompts:
        raise UsageError(
            f"{len(request.negative_prompts)} negative prompts for {request.num_prompts} prompts",
            hint="pass one negative_prompt for all, or one for each",
        )
    _check_embeds(request)
    if request.num_inference_steps is not None and request.num_inference_steps < 1:
        raise UsageError(f"num_inference_steps is {request.num_inference_steps}", hint="take at least 1 step")
    if request.guidance_scale is not None and not math.isfinite(request.guidance_scale):
        raise UsageError(f"guidance_scale is {request.guidance_scale}", hint="1 draws without guidance")
    for name, pixels in (("height", request.height), ("width", request.width)):
        if pixels is not None and pixels < 1:
            raise UsageError(f"{name} is {pixels} pixels", hint="leave it out for the bundle's default")
    if request.num_images_per_prompt < 1:
        raise UsageError(f"num_images_per_prompt is {request.num_images_per_prompt}", hint="take at least 1")
    if request.seed is not None and request.generator is not None:
        raise UsageError("seed and generator are both given", hint="pass one of them")
    generators = [request.generator] if isinstance(request.generator, Generator | None) else request.generator
    if not isinstance(generators, Sequence) or not all(isinstance(g, Generator | None) for g in generators):
        raise UsageError(
            f"generator is {request.generator!r:.80}",
            hint="pass ditc.runtime.rng.Generator(seed): it draws what torch's CPU generator draws",
        )
    if request.output_type not in ("pil", "np", "latent"):
        raise UsageError(f"output_type is {request.output_type!r}", hint='take "pil", "np" or "latent"')


def check_size(height: int, width: int, latents: LatentSpec, spec: StageSpec, defaults: Defaults) -> None:
    """Refuse a picture size that the denoiser was not built for.

    Raises:
        UsageError: with the size, the step and the range, and the nearest size that works.
    """
    for name, value in (("height", height), ("width", width)):
        cells = spec.profile[name]
        allowed = Range(
            *(n * latents.scale_factor for n in (cells.min, cells.opt, cells.max, cells.multiple_of))
        )
        if value not in allowed:
            nearest = min(
                max(round(value / allowed.multiple_of) * allowed.multiple_of, allowed.min), allowed.max
            )
            raise UsageError(
                f"{name} {value} is not a multiple of {allowed.multiple_of} "
                f"from {allowed.min} to {allowed.max}, which this bundle was built for",
                hint=f"take {name} {nearest}; the default is {defaults.height}x{defaults.width}",
            )


def _check_texts(name: str, texts: object) -> None:
    if texts is None or isinstance(texts, str):
        return
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} must be text, got {texts!r:.80}", hint="pass a str or a list of str")


def _check_embeds(request: Request) -> None:
    pairs = (
        ("prompt", request.prompt_embeds, request.prompt_attention_mask),
        ("negative_prompt", request.negative_prompt_embeds, request.negative_prompt_attention_mask),
    )
    for name, embeds, mask in pairs:
        if (embeds is None) != (mask is None):
            raise UsageError(
                f"{name}_embeds and {name}_attention_mask go together", hint="pass both or neither"
            )
        if embeds is None or mask is None:
            continue
        if embeds.shape[0] != request.num_prompts:
            raise UsageError(
                f"{name}_embeds hold {embeds.shape[0]} rows for {request.num_prompts} prompts",
                hint="pass one row for each prompt",
            )
        if embeds.ndim != 3 or embeds.shape[:2] != mask.shape:
            raise UsageError(
                f"{name}_embeds is {tuple(embeds.shape)}, {name}_attention_mask is {tuple(mask.shape)}",
                hint="the mask is (prompts, tokens), the embeds (prompts, tokens, channels)",
            )
