"""Files of videos: MP4 (with PyAV), animated WebP (with Pillow), or a folder of PNG files, one per frame."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from ditc.runtime.atomic import atomic_folder, atomic_path
from ditc.runtime.errors import MissingExtra, OutputError, UsageError
from ditc.runtime.png import write_png

if TYPE_CHECKING:
    from PIL.Image import Image

HINT = "choose another -o"
# x264's constant rate factor, from 0 (lossless) to 51. At 18 a loss can hardly be seen (FFmpeg's H.264 encoding guide).
CRF = "18"
WEBP_QUALITY = 90
# The EXIF tag ImageDescription, in which a WebP file carries its settings.
IMAGE_DESCRIPTION = 0x010E

Save = Callable[[Sequence["Image"], Path, Mapping[str, str], int], None]
# The kinds of files that are one file, and so can be sent.
VideoFormat = Literal["mp4", "webp"]


def check_video_path(path: Path) -> None:
    """Refuse a path whose suffix names no kind of video file that can be written, before any work.

    Raises:
        UsageError: the suffix is not one of WRITERS.
        MissingExtra: PyAV is not installed, and an MP4 file needs it.
    """
    if path.suffix.lower() not in WRITERS:
        raise UsageError(
            f"output {path} is not a kind of file that holds a video",
            hint="name an .mp4 or .webp file, or a folder without a dot in its name for one PNG file per frame",
        )
    if path.suffix.lower() == ".mp4":
        check_mp4()


def check_mp4() -> None:
    """Raise MissingExtra if PyAV is not installed."""
    if find_spec("av") is None:
        raise MissingExtra("av (PyAV), which writes .mp4 files,", "video")


def save_video(frames: Sequence[Image], path: Path, settings: Mapping[str, str], *, fps: int) -> Path:
    """Write a video to a file or a folder, which appears whole or not at all.

    Args:
        path: the suffix says which kind of file; none is a folder.
        settings: what the video was drawn with, as `picture_settings` returns it. The file carries them.
        fps: frames per second.

    Raises:
        OutputError: it cannot be written.
        UsageError, MissingExtra: as `check_video_path`.
    """
    check_video_path(path)
    WRITERS[path.suffix.lower()](frames, path, settings, fps)
    return path


def video_bytes(
    frames: Sequence[Image], form: VideoFormat, settings: Mapping[str, str], *, fps: int, threads: int
) -> bytes:
    """A video as the bytes of a file, with the same content as the file of `save_video`.

    Args:
        threads: of the encoder of MP4 files. WebP is encoded by one.

    Raises:
        MissingExtra: as `check_video_path`.
    """
    file = BytesIO()
    if form == "mp4":
        check_mp4()
        _write_mp4(frames, file, settings, fps, threads=threads)
    else:
        _write_webp(frames, file, settings, fps)
    return file.getvalue()


def _save_mp4(frames: Sequence[Image], path: Path, settings: Mapping[str, str], fps: int) -> None:
    import av

    with atomic_path(path, hint=HINT) as partial:
        try:
            _write_mp4(frames, str(partial), settings, fps)
        except av.FFmpegError as e:
            raise OutputError(f"cannot write {path}: {e}", hint=HINT) from e


def _write_mp4(
    frames: Sequence[Image],
    target: str | IO[bytes],
    settings: Mapping[str, str],
    fps: int,
    *,
    threads: int = 0,
) -> None:
    """H.264 in the form that every player takes: yuv420p, for which odd sides get one more row or column.

    Args:
        target: a path, or a file that can be sought.
        threads: of the encoder; 0 leaves their number to it.
    """
    import av

    with av.open(target, "w", format="mp4") as container:
        container.metadata["comment"] = json.dumps(settings)
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": CRF})
        stream.width, stream.height = (side + side % 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = threads
        for frame in frames:
            picture = av.VideoFrame.from_image(_even(frame))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _even(frame: Image) -> Image:
    """The frame with its last row and column repeated where a side is odd."""
    from PIL import Image as images

    width, height = (side + side % 2 for side in frame.size)
    if (width, height) == frame.size:
        return frame
    whole = images.new("RGB", (width, height))
    right, down = width - frame.width, height - frame.height
    for offset in ((right, down), (right, 0), (0, down), (0, 0)):
        whole.paste(frame, offset)
    return whole


def _save_webp(frames: Sequence[Image], path: Path, settings: Mapping[str, str], fps: int) -> None:
    with atomic_path(path, hint=HINT) as partial, partial.open("wb") as file:
        _write_webp(frames, file, settings, fps)


def _write_webp(frames: Sequence[Image], file: IO[bytes], settings: Mapping[str, str], fps: int) -> None:
    from PIL import Image as images

    exif = images.Exif()
    exif[IMAGE_DESCRIPTION] = json.dumps(settings)
    frames[0].save(
        file,
        format="WEBP",
        save_all=True,
        append_images=list(frames[1:]),
        duration=round(1000 / fps),
        loop=0,
        quality=WEBP_QUALITY,
        exif=exif,
    )


def _save_folder(frames: Sequence[Image], path: Path, settings: Mapping[str, str], fps: int) -> None:
    """Files 00000.png and so on, so that names sort as the frames do. The first one has the settings."""
    with atomic_folder(path, hint=HINT) as folder:
        for index, frame in enumerate(frames):
            with (folder / f"{index:05d}.png").open("wb") as file:
                write_png(frame, file, {**settings, "fps": str(fps)} if index == 0 else {})


WRITERS: dict[str, Save] = {".mp4": _save_mp4, ".webp": _save_webp, "": _save_folder}
