"""Draw the contact sheet: the shipped checkpoint's pictures beside the reference pictures, and free prompts."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from demo.concepts import CHECKPOINT_DIR, DEMO_DIR, WHITE, Pair, caption, load_split
from demo.errors import DemoError
from demo.evaluate import defaults, draw, load_pipeline, quick_pairs
from demo.train import art

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SHEET_FILE = DEMO_DIR / "contact_sheet.png"
MAX_BYTES = 600_000
SAMPLE_FILE = DEMO_DIR / "sample.png"
SAMPLE_PROMPT = "red heart, 3d style"
_COLUMNS, _CELL, _TEXT = 16, 96, 14
_LINE, _LABEL_WIDTH = 11, 15  # of labels: pixels from line to line, and characters
_COLOURS = 256  # with a palette, soft gradients look well enough at a third of the bytes
_TRAINED = [
    Pair("red heart", "classic"),
    Pair("blue heart", "flat"),
    Pair("green heart", "3d"),
    Pair("grinning face", "3d"),
    Pair("crying face", "flat"),
    Pair("nerd face", "classic"),
    Pair("lion", "classic"),
    Pair("penguin", "flat"),
    Pair("elephant", "3d"),
    Pair("butterfly", "classic"),
    Pair("frog", "3d"),
    Pair("pig face", "flat"),
    Pair("hamburger", "classic"),
    Pair("strawberry", "flat"),
    Pair("banana", "3d"),
    Pair("birthday cake", "3d"),
    Pair("ambulance", "classic"),
    Pair("fire engine", "3d"),
    Pair("bicycle", "flat"),
    Pair("airplane", "classic"),
    Pair("rainbow", "3d"),
    Pair("guitar", "classic"),
    Pair("crown", "flat"),
    Pair("wrapped gift", "classic"),
]
FREE_PROMPTS = (
    "red heart",
    "blue heart",
    "green heart",
    "yellow heart",
    "a purple square",
    "an orange circle",
    "kitty cat, classic style",
    "a doggy, 3d style",
    "a slice of pizza, flat style",
    "burning flame, classic style",
    "robot, 3d style, on a yellow background",
    "tulip, flat style, on a blue background",
    "rocket, classic style, on a purple background",
    "penguin, flat style, on a red background",
    "ghost, 3d style, on a green background",
    "frog, classic style, on a grey background",
)


def run(cache: Path, checkpoint: Path = CHECKPOINT_DIR) -> None:
    """Draw the sheet with the checkpoint's defaults.

    Raises:
        DemoError: the checkpoint or the art is missing, or the PNG is larger than its limit.
    """
    held_out = quick_pairs(load_split())[1][:24]
    pipeline, arguments = load_pipeline(checkpoint), defaults(checkpoint)
    rows: list[tuple[str, list[tuple[str, NDArray[np.uint8]]]]] = []
    for title, pairs in (("trained: reference, drawn", _TRAINED), ("held out: reference, drawn", held_out)):
        drawn = draw(pipeline, [caption(p) for p in pairs], arguments)
        references = _references(pairs, cache)
        triples = zip(pairs, references, drawn, strict=True)
        cells = [cell for p, r, d in triples for cell in ((p.style, r), (p.concept, d))]
        rows.append((title, cells))
    free = draw(pipeline, list(FREE_PROMPTS), arguments)
    rows.append(("free prompts", list(zip(FREE_PROMPTS, free, strict=True))))
    _sheet(rows).quantize(_COLOURS, dither=Image.Dither.NONE).save(SHEET_FILE, optimize=True)
    Image.fromarray(draw_sample(pipeline, checkpoint)).save(SAMPLE_FILE, optimize=True)
    if (size := SHEET_FILE.stat().st_size) > MAX_BYTES:
        raise DemoError(f"{SHEET_FILE} has {size} bytes, more than {MAX_BYTES}.", "draw smaller cells.")


def draw_sample(pipeline: DiffusionPipeline, checkpoint: Path) -> NDArray[np.uint8]:
    """The picture (H, W, 3) that a test draws again to see that the checkpoint was loaded correctly."""
    (picture,) = draw(pipeline, [SAMPLE_PROMPT], defaults(checkpoint))
    return np.asarray(picture)


def _references(pairs: list[Pair], cache: Path) -> list[NDArray[np.uint8]]:
    rgba, pictures = art.load(cache)
    row = {Pair(p.concept, p.style): i for i, p in enumerate(pictures)}
    return [art.on_background(rgba[row[p]], WHITE) for p in pairs]


def _sheet(rows: list[tuple[str, list[tuple[str, NDArray[np.uint8]]]]]) -> Image.Image:
    counts = [-(-len(cells) // _COLUMNS) for _, cells in rows]
    cell_heights = [_CELL + 6 + _LINE * _most_lines([label for label, _ in cells]) for _, cells in rows]
    height = sum(_TEXT + n * each for n, each in zip(counts, cell_heights, strict=True))
    sheet = Image.new("RGB", (_COLUMNS * _CELL, height), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for (title, cells), count, cell_height in zip(rows, counts, cell_heights, strict=True):
        pen.text((2, top), title.upper(), fill="black")
        top += _TEXT
        for i, (label, rgb) in enumerate(cells):
            x, y = i % _COLUMNS * _CELL, top + i // _COLUMNS * cell_height
            small = Image.fromarray(rgb).resize((_CELL - 4, _CELL - 4), Image.Resampling.LANCZOS)
            sheet.paste(small, (x + 2, y))
            for j, line in enumerate(textwrap.wrap(label, _LABEL_WIDTH)):
                pen.text((x + 2, y + _CELL - 4 + j * _LINE), line, fill="black")
        top += count * cell_height
    return sheet


def _most_lines(labels: list[str]) -> int:
    return max(len(textwrap.wrap(label, _LABEL_WIDTH)) for label in labels)
