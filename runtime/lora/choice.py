"""Which LoRAs a user chose, and how strongly each is applied: FILE[:SCALE] of the command line."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from ditc.runtime.errors import UsageError

# As diffusers' cross_attention_kwargs scale and ComfyUI's strength, whose usual values are 0 to 2.
MAX_SCALE = 100.0
# More LoRAs than anybody stacks; a bound on what one command or request makes the machine add up.
MAX_LORAS = 16


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """A LoRA's file, and the factor of its change; 1 is what it was trained for.

    Raises:
        UsageError: the scale is not finite, or out of bounds.
    """

    file: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale, str(self.file))


def check_scale(scale: float, name: str) -> None:
    """Raise UsageError unless the scale of the LoRA with this name is a finite number within bounds."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UsageError(
            f"the scale of the LoRA {name} is {scale!r}, which is not a finite number",
            hint="1 is its full effect",
        )
    if abs(scale) > MAX_SCALE:
        raise UsageError(
            f"the scale of the LoRA {name} is {scale}, but at most {MAX_SCALE:.0f} is applied",
            hint="1 is its full effect",
        )


def parse_lora(text: str) -> LoraChoice:
    """The choice that FILE or FILE:SCALE stands for. A colon that no number follows belongs to the file's name.

    Raises:
        UsageError: the scale is not finite, or out of bounds.
    """
    name, colon, number = text.rpartition(":")
    if colon and name:
        try:
            return LoraChoice(Path(name), float(number))
        except ValueError:
            pass
    return LoraChoice(Path(text))


def parse_loras(texts: list[str] | None) -> tuple[LoraChoice, ...]:
    """The choices of a repeated option, in their order.

    Raises:
        UsageError: as `parse_lora`, or there are too many.
    """
    if texts and len(texts) > MAX_LORAS:
        raise UsageError(f"{len(texts)} LoRAs are given", hint=f"at most {MAX_LORAS} are applied together")
    return tuple(map(parse_lora, texts or ()))


def add_lora_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option --lora, whose values `parse_loras` reads. `what` is a sentence that says what is done with it."""
    parser.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help=f"{what} A safetensors file of diffusers, peft, ComfyUI or kohya; SCALE is a number without a unit, 1 if "
        "it is left out. May be given several times (default: none).",
    )
