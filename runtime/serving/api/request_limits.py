"""What one request may ask for, and how long its results are kept: one dataclass for the API and the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ditc.runtime.errors import UsageError
from ditc.runtime.serving.refusals import Invalid

if TYPE_CHECKING:
    from ditc.runtime.prepare import Plan
    from ditc.runtime.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Bounds of everything that a client chooses. How much work all requests may be together is `Bounds` of admission.

    Attributes:
        max_steps: denoising steps of a picture.
        max_pixels: width x height of a picture, or of a frame. 2**22 is 2048x2048.
        max_images: pictures of a request. OpenAI's API has at most 10.
        max_frames: of a video.
        max_video_pixels: width x height x frames of a video. 2**28 is 291 frames of 1280x720 pixels.
        max_frame_bytes: of the frames of all accepted videos together, with 3 bytes per pixel, from their acceptance
            until they are encoded; and 12 bytes per pixel of the largest video of each model that decodes one as a
            whole, of which it decodes one at a time.
        max_picture_bytes: of the decoded pictures that clients have sent, with 9 bytes per pixel, of all requests that
            are not answered yet.
        max_prompt_bytes: of each text, in UTF-8.
        max_timeout: seconds that a client may give its request.
        max_jobs: asynchronous jobs of one key that are known at a time, whether they wait, run or have ended. As many
            idempotency keys of it are known beside them.
        max_kept_bytes: of the encoded pictures and videos that are kept as results of the jobs of one key. As many are
            kept in the answers for its idempotency keys beside them.
        keep_seconds: how long they are kept.

    Raises:
        UsageError: a bound is not positive.
    """

    max_steps: int = 100
    max_pixels: int = 2**22
    max_images: int = 10
    max_frames: int = 321
    max_video_pixels: int = 2**28
    max_frame_bytes: int = 2**31
    max_picture_bytes: int = 2**30
    max_prompt_bytes: int = 8192
    max_timeout: float = 3600.0
    max_jobs: int = 256
    max_kept_bytes: int = 2**28
    keep_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:  # also NaN
                name = "--" + field.name.replace("_", "-")
                raise UsageError(f"{name} is {value}", hint="choose a positive number")

    def check_request(self, request: Request) -> None:
        """Refuse what is too large in the request itself, before any work is done for it.

        Raises:
            Invalid: the message names the argument, its value and the bound.
        """
        for name in ("prompt", "prompt_2", "prompt_3"):
            for argument in (name, f"negative_{name}"):
                self._check_text(argument, getattr(request, argument))
        if request.complex_human_instruction is not None:
            self._check_text("complex_human_instruction", "\n".join(request.complex_human_instruction))
        self._check("n", request.num_images_per_prompt, self.max_images, "pictures")
        self._check("num_inference_steps", request.num_inference_steps, self.max_steps, "steps")
        for name in ("timesteps", "sigmas"):
            values = getattr(request, name)
            self._check(name, None if values is None else len(values), self.max_steps, "steps")
        self._check("frames", request.frames, self.max_frames, "frames")
        if request.height is not None and request.width is not None:
            self._check("size", request.height * request.width, self.max_pixels, "pixels")

    def check_plan(self, plan: Plan) -> None:
        """Refuse what is too large once the bundle's defaults are filled in. Raises Invalid as `check_request`."""
        self._check("num_inference_steps", plan.num_inference_steps, self.max_steps, "steps")
        pixels = max(plan.height * plan.width, plan.drawn_height * plan.drawn_width)
        self._check("size", pixels, self.max_pixels, "pixels")
        if plan.frames is not None:
            self._check("frames", plan.frames, self.max_frames, "frames")
            self._check(
                "frames", plan.frames * pixels, self.max_video_pixels, "pixels in all frames together"
            )

    def _check_text(self, name: str, text: Any) -> None:
        if isinstance(text, str):
            self._check(name, len(text.encode("utf-8")), self.max_prompt_bytes, "bytes")

    def _check(self, name: str, value: int | None, most: int, unit: str) -> None:
        if value is not None and value > most:
            raise Invalid(
                f"{name} asks for {value} {unit}, and this server takes at most {most}",
                hint=f"ask for at most {most} {unit}",
                param=name,
            )


DEFAULTS = RequestLimits()

_OPTIONS = {
    "max_steps": ("STEPS", "The most denoising steps of a picture"),
    "max_pixels": ("PIXELS", "The most pixels of a picture or a frame, width x height"),
    "max_images": ("PICTURES", "The most pictures of one request"),
    "max_frames": ("FRAMES", "The most frames of a video"),
    "max_video_pixels": ("PIXELS", "The most pixels of a video, width x height x frames"),
    "max_frame_bytes": (
        "BYTES",
        "The most bytes of the frames of all accepted videos together, at 3 bytes a pixel; they are in memory from "
        "their decoding until the video is encoded. Of each model that decodes a video as a whole, its largest one has "
        "12 bytes a pixel beside them",
    ),
    "max_picture_bytes": (
        "BYTES",
        "The most bytes of the pictures that clients have sent, of all requests that are not answered yet, at 9 bytes "
        "a pixel; nothing is decoded before there is room",
    ),
    "max_prompt_bytes": ("BYTES", "The most bytes of each text of a request, in UTF-8"),
    "max_timeout": ("SECONDS", "The longest timeout that a client may give its request, in seconds"),
    "max_jobs": (
        "JOBS",
        "The most asynchronous jobs of one key that are known at a time, and the most of its idempotency keys",
    ),
    "max_kept_bytes": (
        "BYTES",
        "The most bytes of finished pictures and videos that are kept for the jobs of one key, and as many for its "
        "idempotency keys",
    ),
    "keep_seconds": ("SECONDS", "How many seconds finished jobs, and answers for idempotency keys, are kept"),
}


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line that `request_limits` reads."""
    for name, (metavar, help_text) in _OPTIONS.items():
        default = getattr(DEFAULTS, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            type=type(default),
            default=default,
            metavar=metavar,
            help=f"{help_text} (default: %(default)s).",
        )


def request_limits(arguments: argparse.Namespace) -> RequestLimits:
    """The limits that were parsed. Raises UsageError as RequestLimits does."""
    return RequestLimits(**{name: getattr(arguments, name) for name in _OPTIONS})
