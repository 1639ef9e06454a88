"""Helpers for tests that compare the pictures of a bundle with those of unmodified diffusers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.output import Output
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import Array

# The bounds that README.md promises for fp32, where only kernels and orders of summation differ.
STEP_RELATIVE_L2 = 1e-4
PICTURE_DB = 45.0


@dataclass(frozen=True)
class Drawn:
    """The latents (B,C,h,w) after every step, and the pictures (B,H,W,3) in [0,1]."""

    latents: list[Array]
    pictures: Array


class Reference:
    """A checkpoint in unmodified diffusers, called with the checkpoint's own defaults (ditc.json)."""

    def __init__(self, checkpoint: Path) -> None:
        defaults = json.loads((checkpoint / "ditc.json").read_text())
        self.pipeline = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self._fixed = {
            "complex_human_instruction": defaults["complex_human_instruction"],
            "max_sequence_length": defaults["max_sequence_length"],
            "use_resolution_binning": False,
            "output_type": "np",
        }

    def draw(self, prompt: str | Sequence[str] | None, *, seed: int | None = None, **arguments: Any) -> Drawn:
        """Draw with diffusers. The arguments are those of its pipeline."""
        latents: list[Array] = []

        def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents.append(tensors["latents"].numpy().copy())
            return tensors

        if seed is not None:
            arguments["generator"] = torch.Generator().manual_seed(seed)
        result = self.pipeline(prompt, callback_on_step_end=keep, **{**self._fixed, **arguments})
        return Drawn(latents, result.images)


def draw(pipeline: Pipeline, prompt: str | Sequence[str] | None, **arguments: Any) -> Drawn:
    """Draw with ditc. The arguments are those of Request."""
    latents: list[Array] = []

    def keep(_: Pipeline, __: int, ___: float, tensors: dict[str, Array]) -> None:
        latents.append(tensors["latents"].copy())

    output: Output = pipeline(prompt, callback_on_step_end=keep, output_type="np", **arguments)
    return Drawn(latents, output.images)


def assert_same(ours: Drawn, theirs: Drawn) -> None:
    """Check that every step is within STEP_RELATIVE_L2 and every picture reaches PICTURE_DB."""
    errors = [relative_l2(a, b) for a, b in zip(ours.latents, theirs.latents, strict=True)]
    assert max(errors) <= STEP_RELATIVE_L2, f"worst step {int(np.argmax(errors))}: {max(errors):.3g}"
    for index, (a, b) in enumerate(zip(ours.pictures, theirs.pictures, strict=True)):
        assert psnr(a, b) >= PICTURE_DB, f"picture {index}: {psnr(a, b):.1f} dB"
