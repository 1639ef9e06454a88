"""The encoded pictures or videos of a finished request, and what is told about how they were drawn."""

from __future__ import annotations

from dataclasses import dataclass
from time import time

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.png import picture_settings
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.api.answers import Details, Lost, VideoDetails
from ditc.runtime.serving.api.asked import Asked
from ditc.runtime.serving.api.drawing import Drawing
from ditc.runtime.serving.api.encoding import VIDEO_THREADS, encode
from ditc.runtime.serving.scheduling.job import Finished
from ditc.runtime.video_files import video_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What is kept of a finished request.

    Attributes:
        created: seconds since 1970.
        pictures: the bytes of a file each, which may be of a video; None for one that failed.
        text_tokens, picture_tokens: how many tokens the text encoders got, and how many patches of latents the denoiser
            made of one picture.
    """

    created: int
    asked: Asked
    pictures: tuple[bytes | None, ...]
    details: Details
    text_tokens: int
    picture_tokens: int

    @property
    def size_bytes(self) -> int:
        return sum(len(picture) for picture in self.pictures if picture is not None)


def details_of(drawing: Drawing) -> Details:
    """What is known of an accepted request before it is drawn."""
    plan, pipeline, video = drawing.job.plan, drawing.model.pipeline, drawing.asked.video
    details = Details(
        id=drawing.job.id,
        model=drawing.model.name,
        bundle=pipeline.manifest.digest,
        certified=not pipeline.uncertified,
        backend=pipeline.backend,
        precision=pipeline.precision,
        seed=plan.seed,
        width=plan.width,
        height=plan.height,
        num_inference_steps=plan.num_inference_steps,
        guidance_scale=plan.guidance_scale,
    )
    if video is None or plan.frames is None:
        return details
    fps = video.fps or pipeline.manifest.defaults.fps
    assert fps is not None  # as in every manifest of videos
    return VideoDetails(**details.model_dump(), frames=plan.frames, fps=fps, output_format=video.format)


def encoded(drawing: Drawing, finished: Finished, details: Details) -> Result:
    """Encode everything. It takes the time of a few steps, so it is done on a thread of `Encoder`."""
    plan, pipeline, asked = drawing.job.plan, drawing.model.pipeline, drawing.asked
    backend = f"{details.backend} {details.precision}".strip()

    def settings(index: int) -> dict[str, str]:
        return picture_settings(pipeline, plan, index, backend=backend)

    pictures = [
        None if picture is None else encode(picture, asked.format, asked.quality, settings(index))
        for index, picture in enumerate(finished.images)
    ]
    if isinstance(details, VideoDetails):
        pictures = [
            None
            if frames is None
            else video_bytes(
                frames, details.output_format, settings(index), fps=details.fps, threads=VIDEO_THREADS
            )
            for index, frames in enumerate(finished.videos)
        ]
    lost = [Lost(index=one.index, reason=one.reason) for one in finished.failures]
    seconds = {name: round(value, 4) for name, value in finished.seconds.items()}
    return Result(
        created=int(time()),
        asked=asked,
        pictures=tuple(pictures),
        details=details.model_copy(update={"seconds": seconds, "failures": lost}),
        text_tokens=_text_tokens(pipeline, plan),
        picture_tokens=_picture_tokens(pipeline, plan),
    )


def _picture_tokens(pipeline: Pipeline, plan: Plan) -> int:
    """How many patches the denoiser made of a picture, or of all latent frames of a video."""
    latents = pipeline.manifest.latents
    frames = 1 if plan.frames is None else latents.shape(plan.drawn_height, plan.drawn_width, plan.frames)[1]
    return frames * latents.num_patches(plan.drawn_height, plan.drawn_width)


def _text_tokens(pipeline: Pipeline, plan: Plan) -> int:
    """How many tokens the request's texts are, at most as many as each encoder reads."""
    encoders = pipeline.conditioning.encoders
    signs = (False, True) if plan.guided else (False,)
    return sum(
        min(encoder.tokenizer.count(text), encoder.spec.max_length)
        for negative in signs
        for texts in plan.request.texts(len(encoders), negative=negative)
        for encoder, text in zip(encoders, texts, strict=True)
    )
