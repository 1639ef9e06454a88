"""What a caller asks for. Names and defaults are those of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ditc.runtime.diffusers_arguments import without_foreign
from ditc.runtime.rng import Generator
from ditc.runtime.session import Array

OutputType = Literal["pil", "np", "latent"]

INTEGERS = (
    *("num_inference_steps", "height", "width", "seed", "num_images_per_prompt"),
    *("max_sequence_length", "frames", "motion_score"),
)
NUMBERS = (
    *("guidance_scale", "skip_layer_guidance_scale", "mu", "max_timesteps"),
    *("skip_layer_guidance_start", "skip_layer_guidance_stop", "intermediate_timesteps"),
    *("pag_scale", "pag_adaptive_scale", "strength"),
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"),
)
TEXTS = ("prompt", "prompt_2", "prompt_3")
EMBEDS = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the pipeline. None means the bundle's default.

    Attributes:
        prompt: one or several texts; None if prompt_embeds are given.
        negative_prompt: one text for all prompts, or one per prompt. It is used if guidance_scale > 1.
        prompt_2, prompt_3, negative_prompt_2, negative_prompt_3: other texts for the second and third text encoder.
            An encoder without a text of its own reads the first. An empty text alone counts as none, as in diffusers;
            an empty text in a list is read as it is.
        num_inference_steps, guidance_scale: apply to every picture of this request.
        timesteps, sigmas: the caller's own schedule, before the scheduler's shift, instead of a number of steps. Which
            of them the bundle's scheduler takes is as in diffusers. SCM's timesteps are angles, one more than steps.
        max_timesteps, intermediate_timesteps: the first angle of SCM's schedule, and the second of three in one of two
            steps. False spaces two steps evenly, as None does in diffusers.
        mu: the shift, instead of the one that follows from the size, for schedulers with dynamic shifting.
        height, width: the size of the pictures, in pixels.
        frames: the number of frames of each video, for bundles that draw videos. It is 1 more than a multiple of the
            frames in a latent frame.
        motion_score: how much moves in the videos of a model that was trained with such scores: its words are put after
            every prompt. None puts nothing there, as diffusers does.
        seed, generator: what the starting noise is drawn from. A list holds one generator per picture. A
            torch.Generator draws with the caller's torch.
        latents: (B,C,H,W) fp32 starting latents, or (B,C,F,H,W) of videos, instead of noise.
        image: the picture to start from, or one per prompt: pictures of Pillow, arrays or tensors (image_input.py says
            which). It is resized to the drawn size. In a bundle that draws videos, it is the first frame.
        mask_image: where to draw anew (white) and where the image stays (black), or one mask per prompt.
        strength: from 0 to 1, how much of the image is replaced: the share of the steps that are done. With 1 the
            picture starts from noise alone, up to the noise level at which the schedule begins. Videos take none.
        control_image: the picture that a ControlNet reads, such as edges or a depth map, or one per prompt, in the
            forms of `image`. Without one, a bundle with a ControlNet draws as if it had none.
        controlnet_conditioning_scale: how strongly the control picture acts; 0 turns it off.
        control_guidance_start, control_guidance_end: the fractions of all steps between which it acts.
        prompt_embeds, prompt_attention_mask, pooled_prompt_embeds, negative_*: (prompts, S, D) fp32, (prompts, S) and
            (prompts, P), instead of texts. Mask and pooled embeddings are given only if the model takes them. Arrays of
            other libraries and other types are converted.
        max_sequence_length: number of tokens of a text, for encoders whose graphs take different numbers.
        complex_human_instruction: lines that are put before every prompt; an empty list puts none.
        skip_guidance_layers: the layers that the bundle's denoiser skips; an empty list turns skip-layer guidance off.
        skip_layer_guidance_scale, _start, _stop: strength of the guidance away from the network with skipped layers (0
            turns it off), and the fractions of all steps between which it acts.
        pag_scale, pag_adaptive_scale: strength of perturbed-attention guidance (0 turns it off), and how much it falls
            per timestep below 1000.
        guidance_interval: the fractions of all steps from which on, and up to which, guidance acts, such as (0.2, 0.8).
            Other steps run the conditional rows alone, which is faster.
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
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    max_timesteps: float | None = None
    intermediate_timesteps: float | Literal[False] | None = None
    mu: float | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    motion_score: int | None = None
    seed: int | None = None
    generator: Generator | Sequence[Generator] | None = None
    num_images_per_prompt: int = 1
    latents: Array | None = None
    image: Any = None
    mask_image: Any = None
    strength: float | None = None
    control_image: Any = None
    controlnet_conditioning_scale: float | None = None
    control_guidance_start: float | None = None
    control_guidance_end: float | None = None
    prompt_embeds: Array | None = None
    prompt_attention_mask: Array | None = None
    negative_prompt_embeds: Array | None = None
    negative_prompt_attention_mask: Array | None = None
    pooled_prompt_embeds: Array | None = None
    negative_pooled_prompt_embeds: Array | None = None
    max_sequence_length: int | None = None
    complex_human_instruction: Sequence[str] | None = None
    skip_guidance_layers: Sequence[int] | None = None
    skip_layer_guidance_scale: float | None = None
    skip_layer_guidance_start: float | None = None
    skip_layer_guidance_stop: float | None = None
    pag_scale: float | None = None
    pag_adaptive_scale: float | None = None
    guidance_interval: Sequence[float] | None = None
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
        if self.prompt is None:
            return ""
        return (
            self.prompt
            if isinstance(self.prompt, str)
            else self.prompt[picture // self.num_images_per_prompt]
        )

    @property
    def num_prompts(self) -> int:
        return len(self.prompts) if self.prompt_embeds is None else int(self.prompt_embeds.shape[0])

    @property
    def num_pictures(self) -> int:
        return self.num_prompts * self.num_images_per_prompt

    @property
    def negative_prompts(self) -> list[str]:
        """One negative text per prompt; None means the empty text."""
        return self._one_each(self.negative_prompt)

    def of_prompts(self, first: int, stop: int) -> Request:
        """The request for the prompts from first up to stop alone. Noise and generator stay as they are."""
        names = (f"{sign}{name}" for sign in ("", "negative_") for name in (*TEXTS, *EMBEDS))
        given = {
            name: getattr(self, name) for name in names if not isinstance(getattr(self, name), str | None)
        }
        return replace(self, **{name: value[first:stop] for name, value in given.items() if len(value)})

    def texts(self, encoders: int, *, negative: bool) -> list[tuple[str, ...]]:
        """Per prompt, the text that each encoder reads.

        As in diffusers, an argument that is empty as a whole stands for the first texts.
        """
        first = self.negative_prompts if negative else self.prompts
        further = self.further_texts(negative=negative).values()
        columns: list[list[str]] = [first] + [self._one_each(text) if text else first for text in further]
        return list(zip(*columns[:encoders], strict=True))

    def further_texts(self, *, negative: bool) -> dict[str, str | Sequence[str] | None]:
        """The texts for the second and third encoder, by name of the argument."""
        names = [f"{'negative_' if negative else ''}prompt_{number}" for number in (2, 3)]
        return {name: getattr(self, name) for name in names}

    def embeds(self, *, negative: bool) -> dict[str, Array]:
        """The embeddings that are given instead of texts, by name of the argument without the prefix negative_."""
        found = {name: getattr(self, f"negative_{name}" if negative else name) for name in EMBEDS}
        return {name: array for name, array in found.items() if array is not None}

    def _one_each(self, text: str | Sequence[str] | None) -> list[str]:
        if not text or isinstance(text, str):
            return [text if isinstance(text, str) else ""] * self.num_prompts
        return list(text)


def make_request(**arguments: Any) -> Request:
    """A request from a caller's keyword arguments, which may be those of diffusers' pipelines.

    As in diffusers, a complex_human_instruction of None puts no instruction before the prompts, and an
    intermediate_timesteps of None spaces the steps evenly.

    Raises:
        UsageError: a request has no such argument (the hint names the most similar one), or an argument of diffusers
            has a value that is not supported.
    """
    if any(arguments.get("complex_human_instruction", ()) is nothing for nothing in (None, False)):
        arguments["complex_human_instruction"] = ()
    if "num_videos_per_prompt" in arguments:  # the name in diffusers' pipelines of videos
        arguments.setdefault("num_images_per_prompt", arguments.pop("num_videos_per_prompt") or 1)
    if arguments.get("intermediate_timesteps", ()) is None:
        arguments["intermediate_timesteps"] = False
    return Request(**without_foreign(arguments, [field.name for field in fields(Request)]))
