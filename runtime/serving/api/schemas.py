"""The bodies of requests that draw, as clients send them. Fields that are not here are refused by name.

Names and values are OpenAI's, and those of `Request` for what OpenAI does not have. A null is the same as no value.
Arguments of OpenAI that mean nothing here are accepted with their default, because clients send it, and refused with
any other value:

    quality       "auto" or "standard": the number of steps says how much work goes into a picture
    style         "vivid"
    background    "auto" or "opaque": pictures have no transparency
    moderation    "auto" or "low": nothing is filtered
    user, safety_identifier    any short text, which is not used

Tensors, paths and addresses are not taken from clients. Pictures are taken as data URLs, which hold them.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ditc.runtime.limits import LARGEST_NUMBER, MAX_FPS, MAX_FRAMES
from ditc.runtime.video_files import VideoFormat

# torch seeds with 64 bits. Seeds are signed there, but not in OpenAI-like APIs.
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Side = Annotated[int, Field(ge=1, le=2**14)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-10_000, le=10_000)]
Fraction = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
Text = Annotated[str, Field(max_length=2**20)]
MOST_URL_BYTES = 2**25  # the server's bound of bodies is usually lower
DataUrl = Annotated[str, Field(max_length=MOST_URL_BYTES)]
Label = Annotated[str, Field(max_length=512)]
Numbers = Annotated[list[Number], Field(min_length=1, max_length=10_000)]
Format = Literal["png", "jpeg", "webp"]
MAX_SECONDS = 3600
SECONDS = r"^[0-9]{1,4}(\.[0-9]{1,3})?$"


def _number_of(value: object) -> object:
    """OpenAI's clients send a number of seconds as a text."""
    return float(value) if isinstance(value, str) and re.fullmatch(SECONDS, value) else value


Seconds = Annotated[
    float,
    Field(allow_inf_nan=False, gt=0, le=MAX_SECONDS),
    BeforeValidator(_number_of),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_SECONDS},
                {"type": "string", "pattern": SECONDS},
            ]
        }
    ),
]


class Body(BaseModel):
    """A JSON object without conversions between types, and without unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class BundleArguments(Body):
    """Arguments of `Request` under their own names, which OpenAI's API does not have."""

    negative_prompt: Text | None = Field(default=None, description="What the picture should not look like.")
    prompt_2: Text | None = Field(
        default=None, description="Another text for the bundle's second text encoder."
    )
    prompt_3: Text | None = Field(
        default=None, description="Another text for the bundle's third text encoder."
    )
    negative_prompt_2: Text | None = Field(
        default=None, description="Another negative text for the second encoder."
    )
    negative_prompt_3: Text | None = Field(
        default=None, description="Another negative text for the third encoder."
    )
    num_inference_steps: int | None = Field(
        default=None, ge=1, le=10_000, description="Number of denoising steps (default: the bundle's)."
    )
    guidance_scale: Number | None = Field(
        default=None, description="How strongly the picture follows the prompt (default: the bundle's)."
    )
    width: Side | None = Field(default=None, description="Width in pixels (default: the bundle's).")
    height: Side | None = Field(default=None, description="Height in pixels (default: the bundle's).")
    seed: Seed | None = Field(
        default=None, description="Seed of the noise (default: a random one, which is told)."
    )
    timesteps: Numbers | None = Field(
        default=None, description="The schedule as timesteps, instead of a number of steps."
    )
    sigmas: Numbers | None = Field(
        default=None, description="The schedule as sigmas, instead of a number of steps."
    )
    max_timesteps: Number | None = Field(
        default=None, description="The first angle of SCM's schedule in radians (default: the bundle's)."
    )
    intermediate_timesteps: Number | Literal[False] | None = Field(
        default=None,
        description="The second angle of SCM's schedule of two steps in radians, or false to space them evenly "
        "(default: the bundle's).",
    )
    mu: Number | None = Field(default=None, description="The shift of a schedule with dynamic shifting.")
    max_sequence_length: int | None = Field(
        default=None, ge=1, le=2**17, description="Number of tokens of a text."
    )
    complex_human_instruction: Annotated[list[Text], Field(max_length=1000)] | None = Field(
        default=None, description="Lines that are put before the prompt; an empty list puts none."
    )
    skip_guidance_layers: (
        Annotated[list[Annotated[int, Field(ge=0, le=10_000)]], Field(max_length=1000)] | None
    ) = Field(default=None, description="Layers that skip-layer guidance skips; an empty list turns it off.")
    skip_layer_guidance_scale: Number | None = Field(default=None, description="Its scale; 0 turns it off.")
    skip_layer_guidance_start: Fraction | None = Field(
        default=None, description="The fraction of steps where it begins."
    )
    skip_layer_guidance_stop: Fraction | None = Field(
        default=None, description="The fraction of steps where it ends."
    )
    pag_scale: Number | None = Field(
        default=None, description="The scale of perturbed-attention guidance; 0 turns it off."
    )
    pag_adaptive_scale: Number | None = Field(
        default=None, description="How much that scale falls per timestep below 1000."
    )
    guidance_interval: Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None = Field(
        default=None,
        description="The fractions of steps where all guidance begins and ends (default: [0, 1]).",
    )
    use_resolution_binning: bool | None = Field(
        default=None,
        description="Whether to draw at the nearest trained size, then resize and crop (default: true).",
    )
    allow_uniform: bool | None = Field(
        default=None,
        description="Whether a picture of one colour is a picture, and not a failure (default: false).",
    )
    strict: bool | None = Field(
        default=None, description="Whether one failed picture fails the whole request (default: false)."
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which the pictures are of no use. The header x-request-timeout says the same.",
    )


class OpenAIBody(BundleArguments):
    """What requests in OpenAI's forms have in common."""

    prompt: Text = Field(description="What to draw.")
    model: Label | None = Field(default=None, description="One of GET /v1/models (default: the first).")
    size: Annotated[str, Field(pattern=r"^([1-9][0-9]{0,4}x[1-9][0-9]{0,4}|auto)$")] | None = Field(
        default=None, description='"WIDTHxHEIGHT" in pixels, or "auto" for the bundle\'s default.'
    )


class ImageBody(OpenAIBody):
    """What requests for pictures have in common."""

    n: int | None = Field(default=None, ge=1, le=10, description="Number of pictures (default: 1).")
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None,
        description='"b64_json". "url" is refused: this server stores no pictures under addresses.',
    )
    output_format: Format | None = Field(default=None, description='Default: "png".')
    output_compression: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="The quality of JPEG and WebP (default: 100). PNG takes only 100.",
    )
    quality: Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description='Only "auto" and "standard", which change nothing.'
    )
    style: Literal["vivid", "natural"] | None = Field(
        default=None, description='Only "vivid", which changes nothing.'
    )
    background: Literal["transparent", "opaque", "auto"] | None = Field(
        default=None, description='Only "opaque" and "auto": pictures have no transparency.'
    )
    moderation: Literal["low", "auto"] | None = Field(
        default=None, description="Changes nothing: nothing is filtered."
    )
    user: Label | None = Field(default=None, description="Not used.")
    safety_identifier: Label | None = Field(default=None, description="Not used.")


class StreamedBody(ImageBody):
    """Requests whose answer may be a stream of events."""

    stream: bool | None = Field(default=None, description="Whether to answer with server-sent events.")
    partial_images: int | None = Field(
        default=None,
        ge=0,
        le=3,
        description="How many previews of each picture to send; needs stream (default: 0).",
    )


class ControlArguments(Body):
    """How a control picture acts, in requests that can have one."""

    controlnet_conditioning_scale: float | None = Field(
        default=None,
        ge=-10_000,
        le=10_000,
        allow_inf_nan=False,
        description="How strongly the control picture acts; 0 turns it off (default: 1).",
    )
    control_guidance_start: float | None = Field(
        default=None, ge=0, le=1, description="The fraction of steps where it begins to act (default: 0)."
    )
    control_guidance_end: float | None = Field(
        default=None, ge=0, le=1, description="The fraction of steps where it ceases to act (default: 1)."
    )


class ControlPicture(ControlArguments):
    """A control picture in a JSON body."""

    control_image: DataUrl | None = Field(
        default=None,
        description="What the bundle's ControlNet reads, such as edges: a PNG, JPEG or WebP file as "
        '"data:image/png;base64,..." (default: none, and the ControlNet does not act).',
    )


class GenerationBody(StreamedBody, ControlPicture):
    """POST /v1/images/generations."""


class EditArguments(Body):
    """How a picture acts that is drawn from, in requests that can have one."""

    strength: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="How much of the picture is replaced: the share of the steps that are done.",
    )


class EditPictures(EditArguments):
    """A picture to draw from, and its mask, in a JSON body."""

    image: DataUrl | None = Field(
        default=None,
        description='The picture to draw from: a PNG, JPEG or WebP file as "data:image/png;base64,..." '
        "(default: none).",
    )
    mask: DataUrl | None = Field(
        default=None,
        description="Where to draw anew, in the same form: where it is transparent or, if it is opaque, white "
        "(default: where the picture is transparent, and everywhere if it is opaque).",
    )


class EditBody(StreamedBody, ControlArguments, EditArguments):
    """The fields of POST /v1/images/edits that are not files."""

    input_fidelity: Literal["low", "high"] | None = Field(default=None, description="Not used.")


class JobBody(ImageBody, ControlPicture, EditPictures):
    """POST /v1/images/jobs."""


class ImageReference(Body):
    """A picture in a body, as in OpenAI's videos API."""

    image_url: DataUrl | None = Field(
        default=None,
        description='A PNG, JPEG or WebP file as "data:image/png;base64,...". Addresses are not fetched.',
    )
    file_id: Label | None = Field(
        default=None, description="Refused: this server keeps no files of clients. Use image_url."
    )


class VideoBody(OpenAIBody):
    """POST /v1/videos."""

    input_reference: ImageReference | None = Field(
        default=None,
        description="The first frame (default: none, and the video begins with the texts alone).",
    )
    seconds: Seconds | None = Field(
        default=None,
        description="How long the video is, instead of frames; the nearest number of frames that the model draws is "
        "taken.",
    )
    frames: int | None = Field(
        default=None, ge=1, le=MAX_FRAMES, description="Number of frames (default: the bundle's)."
    )
    fps: int | None = Field(
        default=None,
        ge=1,
        le=MAX_FPS,
        description="How many frames are shown in a second; it does not change the frames (default: the bundle's).",
    )
    motion_score: int | None = Field(
        default=None,
        ge=0,
        le=LARGEST_NUMBER,
        description="How much moves in the video, for models that were trained with such scores.",
    )
    output_format: VideoFormat | None = Field(
        default=None, description='"mp4" (H.264) or "webp" (animated). Default: "mp4".'
    )


class HuggingFaceParameters(BundleArguments):
    """The `parameters` of Hugging Face's text-to-image task, and further arguments of bundles."""

    scheduler: Label | None = Field(
        default=None, description="Refused: the scheduler is compiled into the bundle."
    )


class HuggingFaceBody(Body):
    """POST /hf/models/NAME."""

    inputs: Text = Field(description="What to draw.")
    parameters: HuggingFaceParameters | None = None
