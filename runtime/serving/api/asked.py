"""What a client asks for, whichever form of the API it uses: a `Request`, and what is to be done with its pictures."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ditc.runtime.errors import MissingExtra, UsageError
from ditc.runtime.request import Request
from ditc.runtime.serving.api.request_limits import RequestLimits
from ditc.runtime.serving.api.schemas import (
    BundleArguments,
    HuggingFaceBody,
    HuggingFaceParameters,
    ImageBody,
    OpenAIBody,
    StreamedBody,
    VideoBody,
)
from ditc.runtime.serving.refusals import Invalid
from ditc.runtime.video_files import VideoFormat, check_mp4

Format = Literal["png", "jpeg", "webp"]
TIMEOUT_HEADER = "x-request-timeout"
# What OpenAI's videos API calls the picture that is the field `image` of Request.
REFERENCE = "input_reference"

REQUEST_FIELDS = frozenset(field.name for field in fields(Request))
# Values that change nothing, of OpenAI's arguments that mean nothing here.
WITHOUT_EFFECT = {
    "quality": ("auto", "standard"),
    "style": ("vivid",),
    "background": ("auto", "opaque"),
}
HINTS = {
    "quality": "leave it out, and choose num_inference_steps",
    "style": "leave it out, and describe the style in the prompt",
    "background": 'choose "opaque": pictures have no transparency',
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoForm:
    """What is to be done with the frames of a video.

    Attributes:
        fps: how many are shown in a second; None for the bundle's default.
        seconds: how long the video is to be; None if the request says the number of frames, or nothing.
    """

    format: VideoFormat
    fps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A checked request for pictures, or for a video.

    Attributes:
        model: None for the server's default.
        format, quality: how the pictures are encoded; the quality, up to 100, is that of JPEG and WebP.
        previews: how many previews of each picture are wanted.
        timeout: seconds after which the pictures are of no use.
        video: None if pictures are wanted.
    """

    request: Request
    model: str | None = None
    format: Format = "png"
    quality: int = 100
    previews: int = 0
    timeout: float | None = None
    video: VideoForm | None = None

    def without_pictures(self) -> Asked:
        """The same without the pictures of the client, for what is kept after the request was accepted."""
        request = replace(self.request, image=None, mask_image=None, control_image=None)
        return replace(self, request=request)

    def invalid(self, error: UsageError) -> Invalid:
        """An error of the pipeline as clients read it, with the argument that its message begins with."""
        first, _, rest = str(error).partition(" ")
        param = first if first in REQUEST_FIELDS else None
        if param == "image" and self.video is not None:
            return Invalid(f"{REFERENCE} {rest}", hint=error.hint, param=REFERENCE)
        return Invalid(str(error), hint=error.hint, param=param)


def asked_by_openai(body: ImageBody, limits: RequestLimits, timeout_header: str = "") -> Asked:
    """The request in a body of OpenAI's form.

    Raises:
        Invalid: an argument is not supported, contradicts another one, or is above its bound.
    """
    if body.response_format == "url":
        raise Invalid(
            "response_format is 'url', but this server stores no pictures under addresses",
            hint="choose b64_json, or POST /v1/images/jobs, whose pictures can be fetched later",
            param="response_format",
            code="unsupported_value",
        )
    for name, without_effect in WITHOUT_EFFECT.items():
        value = getattr(body, name)
        if value is not None and value not in without_effect:
            raise Invalid(
                f"{name} is {value!r}, which means nothing to this server",
                hint=HINTS[name],
                param=name,
                code="unsupported_value",
            )
    output_format = body.output_format or "png"
    quality = 100 if body.output_compression is None else body.output_compression
    if output_format == "png" and quality != 100:
        raise Invalid(
            f"output_compression is {quality}, but PNG has no loss",
            hint='choose output_format "jpeg" or "webp", or leave output_compression out',
            param="output_compression",
        )
    previews = (body.partial_images or 0) if isinstance(body, StreamedBody) else 0
    if previews and not (isinstance(body, StreamedBody) and body.stream):
        raise Invalid(
            f"partial_images is {previews}, but stream is not true",
            hint="set stream to true",
            param="partial_images",
        )
    width, height = _size(body)
    request = _request(body, body.prompt, limits, n=body.n or 1, width=width, height=height)
    return Asked(
        request=request,
        model=body.model,
        format=output_format,
        quality=quality,
        previews=previews,
        timeout=_timeout(body, limits, timeout_header),
    )


def asked_by_video(body: VideoBody, limits: RequestLimits, timeout_header: str = "") -> Asked:
    """The request in the body of OpenAI's videos API.

    Raises:
        Invalid: as `asked_by_openai`; or the format cannot be written here.
    """
    if body.seconds is not None and body.frames is not None:
        raise Invalid(
            f"seconds is {body.seconds:g}, but frames is {body.frames}",
            hint="give only one of them",
            param="frames",
        )
    output_format = body.output_format or "mp4"
    if output_format == "mp4":
        try:
            check_mp4()
        except MissingExtra as e:
            raise Invalid(
                "output_format mp4 is not possible: this server has no PyAV, which writes such files",
                hint=f'choose output_format "webp"; for the operator: {e.hint}',
                param="output_format",
                code="unsupported_value",
            ) from e
    width, height = _size(body)
    further = {"frames": body.frames, "motion_score": body.motion_score}
    request = _request(body, body.prompt, limits, n=1, width=width, height=height, **further)
    return Asked(
        request=request,
        model=body.model,
        timeout=_timeout(body, limits, timeout_header),
        video=VideoForm(format=output_format, fps=body.fps, seconds=body.seconds),
    )


def asked_by_hugging_face(
    body: HuggingFaceBody,
    limits: RequestLimits,
    *,
    model: str,
    format: Format,
    timeout_header: str = "",
) -> Asked:
    """The request in a body of Hugging Face's form. Raises Invalid as `asked_by_openai`."""
    parameters = body.parameters or HuggingFaceParameters()
    if parameters.scheduler is not None:
        raise Invalid(
            "scheduler cannot be chosen: it is compiled into the bundle",
            hint="leave it out",
            param="scheduler",
        )
    request = _request(parameters, body.inputs, limits, n=1, width=parameters.width, height=parameters.height)
    timeout = _timeout(parameters, limits, timeout_header)
    return Asked(request=request, model=model, format=format, timeout=timeout)


def _request(
    body: BundleArguments,
    prompt: str,
    limits: RequestLimits,
    *,
    n: int,
    width: int | None,
    height: int | None,
    **further: Any,
) -> Request:
    """The request. Each field of BundleArguments but timeout is a field of Request, as is each of `further`."""
    names = BundleArguments.model_fields.keys() - {"timeout", "width", "height"}
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    request = Request(prompt=prompt, num_images_per_prompt=n, width=width, height=height, **given, **further)
    limits.check_request(request)
    return request


def _size(body: OpenAIBody) -> tuple[int | None, int | None]:
    """Width and height, from either form of saying it."""
    if body.size is None or body.size == "auto":
        return body.width, body.height
    width, height = (int(side) for side in body.size.split("x"))
    for name, side, other in (("width", width, body.width), ("height", height, body.height)):
        if other is not None and other != side:
            raise Invalid(
                f"size is {body.size}, but {name} is {other}", hint="give only one of them", param=name
            )
    return width, height


def _timeout(body: BundleArguments, limits: RequestLimits, header: str) -> float | None:
    """The shorter of the body's timeout and the header's."""
    given: list[float] = [] if body.timeout is None else [body.timeout]
    if header:
        given.append(float(header))
    if not given:
        return None
    if not 0 < min(given) <= limits.max_timeout:
        raise Invalid(
            f"timeout is {min(given):g} s, and this server takes more than 0 and at most {limits.max_timeout:g} s",
            hint="allow another time, or leave it out",
            param="timeout",
        )
    return min(given)
