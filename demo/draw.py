"""``python -m demo.draw BUNDLE ...``: draw the same prompts with bundles of the demo, and print how long they take.

The pictures are written beside each bundle, and a sheet of all of them beside the first.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ditc.runtime import Pipeline
    from ditc.runtime.lora.choice import LoraChoice

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
_COLUMNS, _CELL, _TEXT, _LABEL = 6, 144, 18, 32
_LABEL_WIDTH = 25  # characters of Pillow's own font in a cell


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, draw, and print an expected failure as an error and a hint."""
    parser = argparse.ArgumentParser(prog="python -m demo.draw", description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    from ditc.runtime import DitcError
    from ditc.runtime.lora.choice import add_lora_argument, parse_loras

    add_lora_argument(parser, "Draw with the first bundle and this LoRA too.")
    arguments = parser.parse_args(argv)
    try:
        _draw(arguments.bundles, parse_loras(arguments.lora))
    except DitcError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 2
    return 0


def _draw(bundles: Sequence[Path], loras: Sequence[LoraChoice]) -> None:
    sections = [_draw_with(bundle) for bundle in bundles]
    sections += [_draw_with(bundles[0], lora) for lora in loras]
    sheet = bundles[0].parent / "contact_sheet.png"
    contact_sheet(sections, PROMPTS).save(sheet)
    print(f"{sheet}: {len(PROMPTS)} prompts with {len(bundles)} bundles and {len(loras)} LoRAs")


def _draw_with(bundle: Path, lora: LoraChoice | None = None) -> tuple[str, list[NDArray[np.float32]]]:
    """A title that names the bundle, its sampler's steps and their time, and one picture of each prompt."""
    from ditc.runtime import Pipeline

    before = perf_counter()
    with Pipeline.load(bundle) as pipeline:
        loaded = perf_counter() - before
        style = ""
        if lora is not None:
            before = perf_counter()
            pipeline.load_loras([lora])
            style = lora.file.stem
            print(f"{lora.file}: added to the weights in {perf_counter() - before:.2f} s")
        pictures, seconds = _draw_all(pipeline, bundle, style)
        steps = pipeline.manifest.defaults.num_inference_steps
    print(
        f"{bundle}: load {loaded:.2f} s; first picture {sum(seconds[0].values()):.2f} s; "
        f"median picture: {_medians(seconds)}; with {pipeline.chosen}"
    )
    return f"{bundle.parent.name}{f' with {style}' if style else ''}, {steps} steps", pictures


def _draw_all(
    pipeline: Pipeline, bundle: Path, style: str
) -> tuple[list[NDArray[np.float32]], list[dict[str, float]]]:
    pictures, seconds = [], []
    for prompt in _track(PROMPTS, f"drawing with {bundle}"):
        result = pipeline(prompt, seed=SEED, output_type="np")
        pictures.append(result.images[0])
        seconds.append(result.seconds)
        words = f"{prompt}, {style}" if style else prompt
        name = "".join(c if c.isalnum() else "-" for c in words).replace("--", "-")
        _to_image(result.images[0]).save(bundle.parent / f"{name}.png")
    return pictures, seconds


def contact_sheet(
    sections: Sequence[tuple[str, Sequence[NDArray[np.float32]]]], labels: Sequence[str]
) -> Image.Image:
    """One sheet of all sections, each with its title above its pictures, and with a label below each picture."""
    rows = math.ceil(len(labels) / _COLUMNS)
    height = _TEXT + rows * (_CELL + _LABEL)
    sheet = Image.new("RGB", (_COLUMNS * _CELL, len(sections) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, pictures) in enumerate(sections):
        top = number * height
        draw.text((4, top + 2), title.upper(), fill="black")
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            x, y = i % _COLUMNS * _CELL, top + _TEXT + i // _COLUMNS * (_CELL + _LABEL)
            sheet.paste(_to_image(picture).resize((_CELL, _CELL), Image.Resampling.LANCZOS), (x, y))
            lines = "\n".join(textwrap.wrap(label, _LABEL_WIDTH))
            draw.multiline_text((x + 4, y + _CELL + 2), lines, fill="black", spacing=2)
    return sheet


def _to_image(picture: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def _medians(seconds: Sequence[dict[str, float]]) -> str:
    return ", ".join(f"{stage} {np.median([s[stage] for s in seconds]):.2f} s" for stage in seconds[0])


def _track(prompts: Sequence[str], description: str) -> Sequence[str]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    # Without a terminal, a transient bar would leave an empty line behind (rich 15).
    shown = console.is_terminal
    return track(prompts, description, console=console, transient=True, disable=not shown)  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main())
