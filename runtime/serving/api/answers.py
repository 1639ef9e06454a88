"""The bodies of answers. What OpenAI's API does not have is under `ditc`, or in fields that its clients pass on."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from ditc.runtime.serving.api.asked import Format
from ditc.runtime.video_files import VideoFormat


class Lost(BaseModel):
    """A picture that failed, while others of its request did not."""

    index: int
    reason: str


class Details(BaseModel):
    """How pictures were drawn: everything that is needed to draw them again, and how long it took."""

    id: str = Field(description="Identifies the drawing in the server's log.")
    model: str
    bundle: str = Field(description="The digest of the bundle's manifest.")
    certified: bool = Field(
        description="Whether parity with PyTorch has been proven for these artifacts on this machine."
    )
    backend: str
    precision: str
    seed: int | None
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seconds: dict[str, float] = Field(
        default={}, description="The time of each part: wait, text, denoise, decode and total."
    )
    failures: list[Lost] = []


class VideoDetails(Details):
    """How a video was drawn."""

    frames: int
    fps: int = Field(description="How many frames are shown in a second.")
    output_format: VideoFormat
    steps_done: int = Field(default=0, description="The number of denoising steps that are done.")
    frames_done: int = Field(default=0, description="The number of frames that are decoded.")


class TokenDetails(BaseModel):
    """Tokens by kind."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens of the texts, and patches of latents of all pictures."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


def usage(*, text_tokens: int, picture_tokens: int) -> Usage:
    """The numbers in OpenAI's form."""
    return Usage(
        input_tokens=text_tokens,
        input_tokens_details=TokenDetails(image_tokens=0, text_tokens=text_tokens),
        output_tokens=picture_tokens,
        output_tokens_details=TokenDetails(image_tokens=picture_tokens, text_tokens=0),
        total_tokens=text_tokens + picture_tokens,
    )


class Picture(BaseModel):
    """One picture. The index is its place in the request, which together with the seed draws it again."""

    b64_json: str
    index: int


class ImagesAnswer(BaseModel):
    """The answer of POST /v1/images/generations. Pictures that failed are missing, and named in ditc.failures."""

    created: int
    background: Literal["opaque"] = "opaque"
    data: list[Picture]
    output_format: Format
    quality: None = Field(default=None, description="Always null: models have no qualities to choose from.")
    size: str
    usage: Usage
    ditc: Details


class PictureEvent(BaseModel):
    """What the events with a picture have in common."""

    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    image_index: int = Field(description="Which of the request's pictures it is.")
    output_format: Format
    quality: Literal["auto"] = "auto"
    size: str


class PartialEvent(PictureEvent):
    """A preview at the size of its picture."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int
    step: int = Field(description="The number of steps that were done.")


class CompletedEvent(PictureEvent):
    """A finished picture. The usage of all of them together is that of the request."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage
    ditc: Details


class ProgressEvent(BaseModel):
    """Steps that are done, of all pictures together. The event without a step is sent when the request is accepted."""

    type: Literal["image_generation.progress"] = "image_generation.progress"
    step: int
    total: int
    ditc: Details | None = None


class ErrorFields(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorFields


class ModelDetails(BaseModel):
    """What a model draws by default, and what it can do."""

    kind: Literal["image", "video"] = Field(
        description="What it draws: pictures, with the paths under /v1/images, or videos, with /v1/videos."
    )
    loaded: bool = Field(description="Whether it can draw at once, without being loaded first.")
    bundle: str = Field(description="The digest of the bundle's manifest.")
    family: str
    width: int
    height: int
    bins: list[tuple[int, int]] = Field(
        description="The sizes that the model was trained with, as (height, width) in pixels."
    )
    num_inference_steps: int
    guidance_scale: float
    frames: int | None = Field(description="The number of frames of a video; null for pictures.")
    fps: int | None = Field(description="How many are shown in a second; null for pictures.")
    capabilities: list[str]
    precisions: list[str] = Field(description="The precisions of the denoisers that the bundle holds.")
    max_batch: int | None = Field(description="The most pictures of one step; null until it is loaded.")
    backend: str | None = Field(description="What it runs on; null until it is loaded.")
    precision: str | None = Field(description="The precision that it runs in; null until it is loaded.")
    certified: bool | None = Field(
        description="Whether parity with PyTorch has been proven on this machine; null until it is loaded."
    )


class ModelAnswer(BaseModel):
    """One model, in OpenAI's form."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the bundle was built.")
    owned_by: Literal["ditc"] = "ditc"
    ditc: ModelDetails | None = Field(description="Null if the bundle cannot be read at the moment.")


class ModelsAnswer(BaseModel):
    """The answer of GET /v1/models. The first model is the default."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class JobError(BaseModel):
    """Why a job has no pictures."""

    code: str
    message: str
    param: str | None = None


class JobAnswer(BaseModel):
    """An asynchronous job, in the shape of OpenAI's video jobs."""

    id: str
    object: Literal["image.job"] = "image.job"
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = Field(
        default=None, description="When its pictures are removed; null while it is in work."
    )
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    progress: int = Field(description="Percent of the steps that are done.")
    size: str
    n: int
    error: JobError | None = None
    usage: Usage | None = None
    ditc: Details


class JobsAnswer(BaseModel):
    """A page of jobs, newest first unless asked otherwise."""

    object: Literal["list"] = "list"
    data: list[JobAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class JobRemoved(BaseModel):
    """The answer of DELETE: a job in work is cancelled, and stays known as cancelled; an ended one is removed."""

    id: str
    object: Literal["image.job.deleted"] = "image.job.deleted"
    deleted: bool = Field(description="Whether the job is removed.")
    status: Literal["cancelled", "completed", "failed"]


class VideoAnswer(BaseModel):
    """A job for a video, in the shape of OpenAI's."""

    id: str
    object: Literal["video"] = "video"
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = Field(
        default=None, description="When the video is removed; null while it is in work."
    )
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(
        description="Percent of the work that is done: of the steps, and of the latent frames that are decoded."
    )
    prompt: str
    seconds: str = Field(description="How long the video is: its frames through the frames of a second.")
    size: str
    error: JobError | None = None
    remixed_from_video_id: None = Field(
        default=None, description="Always null: no video is drawn from another one."
    )
    ditc: VideoDetails


class VideosAnswer(BaseModel):
    """A page of jobs for videos, newest first unless asked otherwise."""

    object: Literal["list"] = "list"
    data: list[VideoAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoRemoved(BaseModel):
    """The answer of DELETE: the job is removed and, if it was in work, cancelled."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
