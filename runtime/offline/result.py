"""The result of one line, as results.jsonl holds it. Equal lines of equal inputs give equal bytes on every run.

    {"line": 1, "id": "tree-1", "status": "done", "seed": 3, "prompt": "a green tree", "settings": {...},
     "pictures": [{"file": "pictures/0000/00000001.png", "sha256": "...", "pixels_sha256": "..."}]}
    {"line": 2, "id": null, "status": "failed", "error": {"message": "...", "hint": "..."}, "pictures": []}

`sha256` is that of the file. `pixels_sha256` is that of the 8-bit RGB values, row by row, which the version of zlib and
the texts in the file do not change. A bundle that draws videos gives `videos` in the place of `pictures`, with the same
fields. Their `pixels_sha256` is that of all frames, one after the other, before a file's loss.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditc.runtime.atomic import write_atomic
from ditc.runtime.offline.line_images import IMAGES
from ditc.runtime.offline.lines import Line
from ditc.runtime.png import TEXTS, picture_settings, write_png
from ditc.runtime.video_files import VideoFormat, video_bytes

if TYPE_CHECKING:
    from PIL import Image

    from ditc.runtime.pipeline import Pipeline
    from ditc.runtime.prepare import Plan
    from ditc.runtime.serving.scheduling.job import Finished

DONE, FAILED = "done", "failed"
# With more threads, an encoder may write other bytes on another machine.
ENCODER_THREADS = 1


@dataclass(frozen=True, slots=True)
class VideoFiles:
    """Which files a batch of videos writes.

    Attributes:
        fps: how many frames are shown in a second.
    """

    form: VideoFormat
    fps: int


def files_of(result: Mapping[str, Any]) -> list[dict[str, str] | None]:
    """The files in a result, of pictures or of videos; None in the place of one that failed."""
    files: list[dict[str, str] | None] = result["videos" if "videos" in result else "pictures"]
    return files


def failed(number: int, id: str | None, message: str, hint: str | None) -> dict[str, Any]:
    """The result of a line without pictures."""
    return {
        "line": number,
        "id": id,
        "status": FAILED,
        "error": {"message": message, "hint": hint},
        "pictures": [],
    }


def drawn(
    line: Line,
    plan: Plan,
    pipeline: Pipeline,
    end: Finished,
    folder: Path,
    videos: VideoFiles | None = None,
) -> dict[str, Any]:
    """Write the pictures or the videos of a line, and return its result.

    Args:
        end: what was drawn. A line of which a picture has failed has failed, and the others are kept.
        videos: None for pictures.

    Raises:
        OutputError: a file cannot be written.
    """
    from ditc.runtime.offline.folder import PICTURES, VIDEOS, file_path

    backend = f"{pipeline.backend} {pipeline.precision}"

    def written(index: int, frames: Sequence[Image.Image]) -> dict[str, str]:
        settings = picture_settings(pipeline, plan, index, backend=backend)
        if videos is None:
            place, suffix, content = PICTURES, "png", _png(frames[0], settings)
        else:
            place, suffix = VIDEOS, videos.form
            content = video_bytes(frames, videos.form, settings, fps=videos.fps, threads=ENCODER_THREADS)
        path = file_path(place, line.number, index, plan.pictures, suffix)
        write_atomic(folder / path, content, hint="choose another -o")
        pixels = hashlib.sha256()
        for frame in frames:
            pixels.update(frame.convert("RGB").tobytes())
        return {
            "file": path.as_posix(),
            "sha256": hashlib.sha256(content).hexdigest(),
            "pixels_sha256": pixels.hexdigest(),
        }

    all_frames: Sequence[Sequence[Image.Image] | None] = end.videos
    if videos is None:
        all_frames = [None if image is None else [image] for image in end.images]
    files = [None if frames is None else written(index, frames) for index, frames in enumerate(all_frames)]
    settings = json.loads(picture_settings(pipeline, plan, 0, backend=backend)["settings"])
    for name in ("index", "num_prompts"):
        del settings[name]
    texts = {name: line.asked[name] for name in ("prompt", *TEXTS, *IMAGES) if name in line.asked}
    result = {
        "line": line.number,
        "id": line.id,
        "status": FAILED if end.failures else DONE,
        "seed": line.seed,
        **texts,
        "settings": settings,
        "pictures" if videos is None else "videos": files,
    }
    if end.failures:
        result["error"] = {"message": str(end.failures[0]), "hint": end.failures[0].hint}
    return result


def _png(image: Image.Image, settings: Mapping[str, str]) -> bytes:
    content = io.BytesIO()
    write_png(image, content, settings)
    return content.getvalue()
