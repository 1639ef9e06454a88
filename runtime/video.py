"""Videos: how many frames a request may ask for, and decoding them, one latent frame at a time where that works.

A decoder of videos is two stages (step_contract.py, KEPT): one decodes the first latent frame to one frame, the other
one decodes every later one to LatentSpec.frames_per_cell frames. What a convolution over time keeps is an output of one
run and an input of the next, so memory does not grow with the length of the video. A decoder that is not causal in time
is one stage, which decodes all latent frames at once.
"""

# C latent channels, F latent frames, h/w latent size, T frames, H/W pixels

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ditc.runtime.bundle.manifest import LatentSpec, Manifest, Tiling
from ditc.runtime.errors import NumericsError, UsageError
from ditc.runtime.images import is_uniform, resize_and_crop, to_pil, to_uint8, to_unit_range
from ditc.runtime.request import Request
from ditc.runtime.session import Array, Session, Tensor, to_numpy
from ditc.runtime.spec import StageSpec
from ditc.runtime.step_contract import FRAMES, KEPT, LATENTS, StepContract
from ditc.runtime.vae import decode_tiled


def decide_frames(request: Request, manifest: Manifest, denoiser: StageSpec) -> int | None:
    """The number of frames of each video; None for a bundle that draws pictures.

    Raises:
        UsageError: the bundle draws pictures but the request asks for frames, or the number is not one that the bundle
            was built for. The hint names the nearest one that works.
    """
    latents, default = manifest.latents, manifest.defaults.frames
    if latents.frames_per_cell is None or default is None:
        if request.frames is not None:
            raise UsageError(
                f"frames is {request.frames}, but this bundle draws pictures",
                hint="leave frames out, or use a bundle of a model that draws videos",
            )
        return None
    frames = default if request.frames is None else request.frames
    check_frames(frames, latents, denoiser, default)
    return frames


def check_frames(frames: int, latents: LatentSpec, denoiser: StageSpec, default: int) -> None:
    """Refuse a number of frames that the denoiser was not built for. Raises UsageError, as `decide_frames`."""
    step, cells = latents.frames_per_cell or 1, denoiser.profile[FRAMES]
    low, high = latents.frames_of(cells.min), latents.frames_of(cells.max)
    if low <= frames <= high and (frames - 1) % step == 0:
        return
    nearest = min(max(1 + round((frames - 1) / step) * step, low), high)
    raise UsageError(
        f"frames is {frames}, but this bundle draws {low} to {high} frames, and only 1 more than a multiple of {step}",
        hint=f"use {nearest} frames; the default is {default}",
    )


def check_video_request(request: Request, latents: LatentSpec, contract: StepContract, frames: int) -> None:
    """Refuse what no video is drawn from, and an image where it cannot be the first frame.

    Raises:
        UsageError: the message names the argument.
    """
    for name in ("mask_image", "strength", "control_image"):
        if getattr(request, name) is not None:
            raise UsageError(
                f"{name} is given, but this bundle draws videos, and takes an image as the first frame alone",
                hint=f"leave {name} out",
            )
    if request.image is None:
        return
    if not contract.holds_frames:
        raise UsageError(
            "image is given, but this bundle was built for videos from texts alone",
            hint="build it again with this version: ditc build CHECKPOINT -o BUNDLE",
        )
    if frames == 1:
        raise UsageError(
            "image is the first frame, and a video of 1 frame has no other one to draw",
            hint=f"use {latents.frames_of(2)} frames or more, or leave it out",
        )


class _Pieces:
    """The two stages over the pieces of a picture: the whole of it, or its tiles, always in the same order.

    Args:
        first, following: as in `decoded_chunks`.
    """

    def __init__(self, first: Session, following: Session) -> None:
        self._first, self._following = first, following
        self._kept: list[dict[str, Tensor]] = []  # by piece
        self._frame, self._piece = -1, 0

    def begin(self, frame: int) -> None:
        """Go on to the pieces of a latent frame."""
        self._frame, self._piece = frame, 0

    def __call__(self, latents_1Chw: Array) -> Array:
        """The frames (T,3,H,W) of the next piece of this latent frame."""
        session = self._following if self._frame else self._first
        kept = self._kept[self._piece] if self._frame else {}
        outputs = session.run({LATENTS: np.ascontiguousarray(latents_1Chw[:, :, None]), **kept})
        names = [tensor.name for tensor in session.spec.outputs]
        frames = to_numpy(outputs[names[0]])
        if not np.isfinite(frames).all():
            raise NumericsError(
                f"{session.spec.name}: the frames of latent frame {self._frame} have NaN or Inf",
                hint="rebuild this stage in bf16 or fp32",
            )
        left = {f"{KEPT}{i}": outputs[name] for i, name in enumerate(names[1:])}
        self._kept[self._piece : self._piece + 1] = [left]
        self._piece += 1
        return frames[0].transpose(1, 0, 2, 3)


def decoded_chunks(
    first: Session,
    following: Session | None,
    latents_1CFhw: Tensor,
    *,
    tiling: Tiling | None = None,
    scale: int = 1,
) -> Iterator[Array]:
    """The frames (T,3,H,W) in [-1,1] of one latent frame after the other: one of the first, then T each.

    Args:
        first, following: the sessions of the two stages. Without the second, the first decodes all frames at once, and
            each is a chunk. Their range is nominal, because diffusers clamps only what AutoencoderKLWan decodes.
        tiling: None decodes whole frames. Tiles are cut and blended as diffusers' AutoencoderKLWan.tiled_decode does it
            (0.42.1), but all tiles of one latent frame come before the next latent frame, so memory does not grow with
            the length of the video here either. A decoder of one stage takes no tiles (vae.py, check_tiles).
        scale: pixels per latent cell, for tiles.

    Raises:
        NumericsError: the decoder returned NaN or Inf.
    """
    latents = to_numpy(latents_1CFhw)
    if following is None:
        frames = _whole_video(first, latents)
        yield from (frames[index : index + 1] for index in range(len(frames)))
        return
    pieces = _Pieces(first, following)
    for index in range(latents.shape[2]):
        pieces.begin(index)
        frame_1Chw = latents[:, :, index]
        if tiling is None:
            frames = pieces(frame_1Chw)
        else:
            frames = decode_tiled(pieces, frame_1Chw, tile=tiling.tile, stride=tiling.stride, scale=scale)
        # diffusers' AutoencoderKLWan clamps what it decodes (0.42.1, _decode).
        yield np.clip(frames, -1, 1)


def _whole_video(session: Session, latents_1CFhw: Array) -> Array:
    """All frames (T,3,H,W) of a video by the one stage of its decoder. Raises NumericsError for NaN or Inf."""
    (video,) = (to_numpy(output) for output in session.run({LATENTS: latents_1CFhw}).values())
    if not np.isfinite(video).all():
        raise NumericsError(
            f"{session.spec.name}: the frames have NaN or Inf", hint="rebuild this stage in bf16 or fp32"
        )
    return video[0].transpose(1, 0, 2, 3)


def sized_chunks(
    first: Session,
    following: Session | None,
    latents_1CFhw: Tensor,
    *,
    height: int,
    width: int,
    tiling: Tiling | None = None,
    scale: int = 1,
) -> Iterator[Array]:
    """The frames of `decoded_chunks`, resized and cropped to this size in pixels where they have another one.

    Args:
        first, following, tiling, scale: as in `decoded_chunks`.

    Raises:
        NumericsError: as in `decoded_chunks`.
    """
    for frames in decoded_chunks(first, following, latents_1CFhw, tiling=tiling, scale=scale):
        same = frames.shape[2:] == (height, width)
        yield frames if same else resize_and_crop(frames, height, width)


def decode_video(
    first: Session,
    following: Session | None,
    latents_1CFhw: Tensor,
    *,
    height: int,
    width: int,
    as_pil: bool,
    tiling: Tiling | None = None,
    scale: int = 1,
) -> tuple[list[object] | Array, bool]:
    """One video in the requested size, and whether each of its frames has one colour only.

    Args:
        first, following, tiling, scale: as in `decoded_chunks`.
        height, width: in pixels, as VideoProcessor.resize_and_crop_tensor of diffusers makes them.
        as_pil: gives a list of PIL images instead of floats (1,F,H,W,3) in [0,1].

    Raises:
        NumericsError: as in `decoded_chunks`.
    """
    pictures: list[object] = []
    arrays: list[Array] = []
    uniform = True
    chunks = sized_chunks(
        first, following, latents_1CFhw, height=height, width=width, tiling=tiling, scale=scale
    )
    for frames in chunks:
        in_bytes = to_uint8(frames)
        uniform = uniform and all(is_uniform(frame) for frame in in_bytes)
        if as_pil:
            pictures += to_pil(in_bytes)
        else:
            arrays.append(to_unit_range(frames))
    return (pictures if as_pil else np.concatenate(arrays)[None]), uniform


def refuse_videos(manifest: Manifest, verb: str) -> None:
    """Refuse a bundle that draws videos in a verb that draws pictures alone.

    Raises:
        UsageError: the bundle draws videos.
    """
    if manifest.latents.has_frames:
        raise UsageError(
            f"this bundle draws videos, and {verb} takes bundles that draw pictures",
            hint='draw videos with: ditc run BUNDLE "PROMPT" -o out.mp4, ditc batch or ditc serve, or in Python with '
            "Pipeline.load",
        )
