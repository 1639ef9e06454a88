"""Draw the sheet of the variants: the same prompts with the checkpoint, the distilled model and the style LoRA."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from demo.concepts import CHECKPOINT_DIR, DEMO_DIR, LORA_FILE
from demo.draw import PROMPTS, contact_sheet
from demo.evaluate import defaults, draw, load_pipeline
from demo.join import join

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

SHEET_FILE = DEMO_DIR / "variants.png"
_STEPS = (4, 2, 1)
_COLOURS = 256  # as on the other sheet, a palette costs little quality and saves bytes


def run(_cache: Path) -> None:
    """Draw the sheet with diffusers, from the shipped files."""
    pipeline = load_pipeline(CHECKPOINT_DIR)
    sections = [("checkpoint, 20 steps", _drawn(pipeline, CHECKPOINT_DIR))]
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / "sprint"
        join(joined)
        sprint = load_pipeline(joined)
        sections += [(f"sprint, {n} step{'s' * (n > 1)}", _drawn(sprint, joined, n)) for n in _STEPS]
    add_lora(pipeline.transformer, LORA_FILE)
    sections.append(
        (f"checkpoint with the {LORA_FILE.stem} LoRA, 20 steps", _drawn(pipeline, CHECKPOINT_DIR))
    )
    sheet = contact_sheet(sections, PROMPTS)
    sheet.quantize(_COLOURS, dither=Image.Dither.NONE).save(SHEET_FILE, optimize=True)


def add_lora(model: torch.nn.Module, path: Path) -> None:
    """Add the products of a LoRA file's matrices to the weights, as diffusers' ``fuse_lora`` does with alpha = rank."""
    weights = load_file(path)
    for name in weights:
        if name.endswith(".lora_A.weight"):
            down, up = weights[name], weights[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            with torch.no_grad():
                model.get_parameter(f"{layer}.weight").add_(up.float() @ down.float())


def _drawn(
    pipeline: DiffusionPipeline, checkpoint: Path, steps: int | None = None
) -> list[NDArray[np.float32]]:
    pictures = draw(pipeline, list(PROMPTS), defaults(checkpoint, steps))
    return list(pictures.astype(np.float32) / 255)
