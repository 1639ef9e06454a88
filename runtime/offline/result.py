"""The result of one line, as results.jsonl holds it. Equal lines of equal inputs give equal bytes on every run.

    {"line": 1, "id": "tree-1", "status": "done", "seed": 3, "prompt": "a green tree", "settings": {...},
     "pictures": [{"file": "pictures/0000/00000001.png", "sha256": "...", "pixels_sha256": "..."}]}
    {"line": 2, "id": null, "status": "failed", "error": {"message": "...", "hint": "..."}, "pictures": []}

`sha256` is that of the file. `pixels_sha256` is that of the 8-bit RGB values, row by row, which the version of zlib and
the texts in the file do not change.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditc.runtime.atomic import write_atomic
from ditc.runtime.offline.line_images import IMAGES
from ditc.runtime.offline.lines import Line
from ditc.runtime.png import TEXTS, picture_settings, write_png

if TYPE_CHECKING:
    from PIL import Image

    from ditc.runtime.failure import Failure
    from ditc.runtime.pipeline import Pipeline
    from ditc.runtime.prepare import Plan

DONE, FAILED = "done", "failed"


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
    images: Sequence[Image.Image | None],
    failures: Sequence[Failure],
    folder: Path,
) -> dict[str, Any]:
    """Write the pictures of a line, and return its result.

    Args:
        images: None for one that failed. The line has then failed, and the others are kept.

    Raises:
        OutputError: a picture cannot be written.
    """
    from ditc.runtime.offline.folder import picture_path

    backend = f"{pipeline.backend} {pipeline.precision}"
    pictures: list[dict[str, str] | None] = []
    for index, image in enumerate(images):
        if image is None:
            pictures.append(None)
            continue
        content = io.BytesIO()
        write_png(image, content, picture_settings(pipeline, plan, index, backend=backend))
        path = picture_path(line.number, index, len(images))
        write_atomic(folder / path, content.getvalue(), hint="choose another -o")
        pictures.append(
            {
                "file": path.as_posix(),
                "sha256": hashlib.sha256(content.getvalue()).hexdigest(),
                "pixels_sha256": hashlib.sha256(image.convert("RGB").tobytes()).hexdigest(),
            }
        )
    settings = json.loads(picture_settings(pipeline, plan, 0, backend=backend)["settings"])
    for name in ("index", "num_prompts"):
        del settings[name]
    texts = {name: line.asked[name] for name in ("prompt", *TEXTS, *IMAGES) if name in line.asked}
    result = {
        "line": line.number,
        "id": line.id,
        "status": FAILED if failures else DONE,
        "seed": line.seed,
        **texts,
        "settings": settings,
        "pictures": pictures,
    }
    if failures:
        result["error"] = {"message": str(failures[0]), "hint": failures[0].hint}
    return result
