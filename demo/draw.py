"""``python -m demo.draw BUNDLE``: pictures from the demo bundle, their seconds, and a parity line against diffusers."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ditc.runtime.pipeline import Pipeline

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
COMPARED = 4  # pictures that diffusers draws too: enough for a minimum, few enough for a laptop
FLOOR_DB = 45.0  # what fp32 on both sides must reach; a visible difference begins far below
_COLUMNS, _CELL, _TEXT = 4, 192, 18


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, compare, report; exit code 1 when the pictures are not those of diffusers."""
    parser = argparse.ArgumentParser(prog="python -m demo.draw", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--against", type=Path, help="checkpoint that diffusers draws from, for comparison")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for the pictures")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)

    from ditc.runtime.errors import DitcError

    try:
        pictures = _draw(arguments.bundle, arguments.output)
    except DitcError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 2
    if arguments.against is None:
        return 0
    reference = draw_with_diffusers(arguments.against, PROMPTS[:COMPARED])
    values = [psnr_db(a, b) for a, b in zip(pictures, reference, strict=False)]
    verdict = "ok" if min(values) >= FLOOR_DB else "FAILED"
    print(
        f"parity with diffusers, {len(values)} pictures, same seed: min {min(values):.1f} dB, "
        f"mean {sum(values) / len(values):.1f} dB (at least {FLOOR_DB:.0f}): {verdict}"
    )
    return int(verdict != "ok")


def psnr_db(picture: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Peak signal-to-noise ratio of (H,W,3) pictures in [0,1], in dB; inf when they are equal."""
    mse = float(np.mean((picture.astype(np.float64) - reference) ** 2))
    return -10 * math.log10(mse) if mse else math.inf


def draw_with_diffusers(checkpoint: Path, prompts: Sequence[str]) -> list[NDArray[np.float32]]:
    """The prompts as unmodified diffusers draws them in fp32, with the checkpoint's own defaults and SEED."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import torch
    from diffusers import SanaPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    defaults = json.loads((checkpoint / "ditc.json").read_text(encoding="utf-8"))
    defaults.pop("resolution_bins")
    pipeline = SanaPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return [
        pipeline(
            prompt,
            generator=torch.Generator().manual_seed(SEED),
            use_resolution_binning=False,
            output_type="np",
            **defaults,
        ).images[0]
        for prompt in _track(prompts, "diffusers")
    ]


def _draw(bundle: Path, output: Path) -> list[NDArray[np.float32]]:
    from ditc.runtime.pipeline import Pipeline

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
    return pictures


def _draw_all(pipeline: Pipeline, output: Path) -> tuple[list[NDArray[np.float32]], list[dict[str, float]]]:
    pictures, seconds = [], []
    for prompt in _track(PROMPTS, "ditc"):
        result = pipeline(prompt, seed=SEED, output_type="np")
        pictures.append(result.images[0])
        seconds.append(result.seconds)
        name = "".join(c if c.isalnum() else "-" for c in prompt).replace("--", "-")
        _to_image(result.images[0]).save(output / f"{name}.png")
    return pictures, seconds


def contact_sheet(pictures: Sequence[NDArray[np.float32]], labels: Sequence[str]) -> Image.Image:
    """All pictures with their prompts below."""
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


def _track(prompts: Sequence[str], name: str) -> Sequence[str]:
    from rich.console import Console
    from rich.progress import track

    return track(prompts, description=f"drawing with {name}", console=Console(stderr=True), transient=True)  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main())
