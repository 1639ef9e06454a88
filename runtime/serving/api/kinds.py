"""Pictures or videos: which paths a model answers, which videos begin with a picture, and frames of some seconds."""

from __future__ import annotations

from dataclasses import replace

from ditc.runtime.bundle.manifest import LatentSpec, Manifest, load_manifest
from ditc.runtime.errors import DitcError, UsageError
from ditc.runtime.request import Request
from ditc.runtime.serving.api.asked import REFERENCE, Asked, VideoForm
from ditc.runtime.serving.model import Model
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Invalid
from ditc.runtime.spec import DENOISER, VAE_ENCODER, StageSpec
from ditc.runtime.step_contract import FRAMES
from ditc.runtime.video import check_frames

IMAGE_PATHS = "POST /v1/images/generations, /v1/images/jobs or /hf/models/NAME"
VIDEO_PATH = "POST /v1/videos"


def check_kind(manifest: Manifest, name: str, *, videos: bool) -> None:
    """Refuse a model that draws something else than its path gives.

    Args:
        videos: whether the path is that of videos.

    Raises:
        Invalid: the hint names the right path.
    """
    if manifest.latents.has_frames == videos:
        return
    drawn, wanted = ("pictures", "videos") if videos else ("videos", "pictures")
    raise Invalid(
        f"the model {name} draws {drawn}, and this path gives {wanted}",
        hint=f"use {IMAGE_PATHS if videos else VIDEO_PATH}, or another model: GET /v1/models says what each draws",
        param="model",
        code="wrong_path",
    )


def check_model(manifest: Manifest, name: str, asked: Asked) -> None:
    """Refuse a model that draws something else than its path gives, or that starts no video from a picture.

    Raises:
        Invalid: as `check_kind`, or there is a picture for a video that can only begin with texts.
    """
    check_kind(manifest, name, videos=asked.video is not None)
    if asked.video is not None and asked.request.image is not None and not takes_first_frame(manifest):
        raise Invalid(
            f"{REFERENCE} is given, but the model {name} draws videos from texts alone",
            hint="leave it out, or use a model whose capabilities in GET /v1/models have image-to-video",
            param=REFERENCE,
            code="unsupported_value",
        )


def takes_first_frame(manifest: Manifest) -> bool:
    """Whether a bundle draws videos that begin with a picture. One that was built for texts alone does not."""
    denoisers = manifest.stages[DENOISER].artifacts
    holds = any(manifest.step_contract(artifact.spec).holds_frames for artifact in denoisers)
    return manifest.latents.has_frames and VAE_ENCODER in manifest.stages and holds


def check_model_before_opening(models: Models, asked: Asked) -> None:
    """The same for a model that may not be open. Reads its manifest; one that cannot be read is refused later.

    Raises:
        Invalid: as `check_model`.
    """
    name = models.names[0] if asked.model is None else asked.model
    if name in models.names and models.opened(name) is None:
        try:
            manifest = load_manifest(models.bundles[name])
        except DitcError:
            return
        check_model(manifest, name, asked)


def with_frames(request: Request, form: VideoForm, model: Model) -> Request:
    """The request with the number of frames that its seconds are, if it gives some.

    Raises:
        Invalid: the model draws no video that long. The hint says how long they may be.
    """
    if form.seconds is None:
        return request
    drawable = model.pipeline.drawable
    latents, defaults = drawable.manifest.latents, drawable.manifest.defaults
    assert defaults.frames is not None and defaults.fps is not None  # as in every manifest of videos
    fps = form.fps or defaults.fps
    frames = nearest_frames(form.seconds * fps, latents)
    try:
        check_frames(frames, latents, drawable.denoiser, defaults.frames)
    except UsageError as e:
        low, high = _range(latents, drawable.denoiser)
        raise Invalid(
            f"seconds is {form.seconds:g}, which is {frames} frames at {fps} a second, and this model draws {low} to "
            f"{high}",
            hint=f"ask for {low / fps:.3g} to {high / fps:.3g} seconds, or choose another fps",
            param="seconds",
        ) from e
    return replace(request, frames=frames)


def nearest_frames(wanted: float, latents: LatentSpec) -> int:
    """The number of frames of whole latent frames that is nearest to a number; of two, the larger one.

    At 16 frames a second, 5 seconds are 80 frames, and nearest to them is 81, which is 21 latent frames of 4.
    """
    step = latents.frames_per_cell or 1
    return 1 + step * max(0, int((wanted - 1) / step + 0.5))


def _range(latents: LatentSpec, denoiser: StageSpec) -> tuple[int, int]:
    cells = denoiser.profile[FRAMES]
    return latents.frames_of(cells.min), latents.frames_of(cells.max)
