"""The encoded pictures of a finished request, and what is told about how they were drawn."""

from __future__ import annotations

from dataclasses import dataclass
from time import time

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.png import picture_settings
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.api.answers import Details, Lost
from ditc.runtime.serving.api.asked import Asked
from ditc.runtime.serving.api.drawing import Drawing
from ditc.runtime.serving.api.encoding import encode
from ditc.runtime.serving.scheduling.job import Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What is kept of a finished request.

    Attributes:
        created: seconds since 1970.
        pictures: the bytes of a file each; None for a picture that failed.
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
    plan, pipeline = drawing.job.plan, drawing.model.pipeline
    return Details(
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


def encoded(drawing: Drawing, finished: Finished, details: Details) -> Result:
    """Encode all pictures. It takes the time of a few steps, so it is done on a thread of `Encoder`."""
    plan, pipeline, asked = drawing.job.plan, drawing.model.pipeline, drawing.asked
    backend = f"{details.backend} {details.precision}".strip()
    pictures = tuple(
        None
        if picture is None
        else encode(
            picture, asked.format, asked.quality, picture_settings(pipeline, plan, index, backend=backend)
        )
        for index, picture in enumerate(finished.images)
    )
    lost = [Lost(index=one.index, reason=one.reason) for one in finished.failures]
    seconds = {name: round(value, 4) for name, value in finished.seconds.items()}
    return Result(
        created=int(time()),
        asked=asked,
        pictures=pictures,
        details=details.model_copy(update={"seconds": seconds, "failures": lost}),
        text_tokens=_text_tokens(pipeline, plan),
        picture_tokens=pipeline.manifest.latents.num_patches(plan.drawn_height, plan.drawn_width),
    )


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
