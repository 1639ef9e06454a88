"""``python -m demo.draw BUNDLE``: draw pictures with the demo bundle, and print how long they take."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ditc.runtime import Pipeline

PROMPTS = (
    "red heart, 3d style",
    "blue heart, flat style",
    "green heart, classic style",
    "grinning face, 3d style",
    "lion, classic style",
    "penguin, flat style",
    "pizza, 3d style",
    "strawberry, flat style",
    "rocket, classic style",
    "fire engine, 3d style",
    "rainbow, 3d style",
    "ghost, 3d style, on a blue background",
)
SEED = 1
_COLUMNS, _CELL, _TEXT = 4, 192, 18


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, draw, and print an expected failure as an error and a hint."""
    parser = argparse.ArgumentParser(prog="python -m demo.draw", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for the pictures")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)

    from ditc.runtime import DitcError

    try:
        _draw(arguments.bundle, arguments.output)
    except DitcError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 2
    return 0


def _draw(bundle: Path, output: Path) -> None:
    from ditc.runtime import Pipeline

    before = perf_counter()
    with Pipeline.load(bundle) as pipeline:
        loaded = perf_counter() - before
        pictures, seconds = _draw_all(pipeline, output)
    sheet = output / "contact_sheet.png"
    contact_sheet(pictures, PROMPTS).save(sheet)
    print(f"{sheet}: {len(pictures)} pictures with {pipeline.chosen}")
    print(
        f"load {loaded:.2f} s; first picture {sum(seconds[0].values()):.2f} s; median picture: {_medians(seconds)}"
    )


def _draw_all(pipeline: Pipeline, output: Path) -> tuple[list[NDArray[np.float32]], list[dict[str, float]]]:
    pictures, seconds = [], []
    for prompt in _track(PROMPTS):
        result = pipeline(prompt, seed=SEED, output_type="np")
        pictures.append(result.images[0])
        seconds.append(result.seconds)
        name = "".join(c if c.isalnum() else "-" for c in prompt).replace("--", "-")
        _to_image(result.images[0]).save(output / f"{name}.png")
    return pictures, seconds


def contact_sheet(pictures: Sequence[NDArray[np.float32]], labels: Sequence[str]) -> Image.Image:
    """One sheet of all pictures, each with its label below it."""
    rows = math.ceil(len(pictures) / _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _CELL, rows * (_CELL + _TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = i % _COLUMNS * _CELL, i // _COLUMNS * (_CELL + _TEXT)
        sheet.paste(_to_image(picture).resize((_CELL, _CELL), Image.Resampling.LANCZOS), (x, y))
        draw.text((x + 4, y + _CELL + 2), label, fill="black")
    return sheet


def _to_image(picture: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def _medians(seconds: Sequence[dict[str, float]]) -> str:
    return ", ".join(f"{stage} {np.median([s[stage] for s in seconds]):.2f} s" for stage in seconds[0])


def _track(prompts: Sequence[str]) -> Sequence[str]:
    from rich.console import Console
    from rich.progress import track

    return track(prompts, description="drawing", console=Console(stderr=True), transient=True)  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main())
