"""ditc.json: the inference defaults that a checkpoint carries beside its model_index.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ditc.export.checkpoint.json_files import read_json
from ditc.runtime.errors import CheckpointError
from ditc.runtime.limits import LARGEST_NUMBER, MAX_FPS, MAX_FRAMES, MAX_SIDE, MAX_STEPS, MAX_TOKENS


def _up_to(most: int) -> tuple[Callable[[object], bool], str]:
    return lambda value: type(value) is int and 0 < value <= most, f"an integer from 1 to {most}"


_is_size, _ = SIZE = _up_to(MAX_SIDE)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST_NUMBER  # type: ignore[operator]


def _is_layers(value: object) -> bool:
    return isinstance(value, list) and all(type(layer) is int and layer >= 0 for layer in value)


def _is_layer_names(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) or _is_layers([name]) for name in value)
    )


def _is_bins(value: object) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_size, pair)) for pair in value)
    )


def _is_tiling(value: object) -> bool:
    return value is None or (
        isinstance(value, dict) and set(value) == {"tile", "stride"} and all(map(_is_size, value.values()))
    )


def _is_lines(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(line, str) for line in value))


# The keys are diffusers' argument names. Sizes are in pixels; resolution_bins are [height, width] pairs. null means
# that the model has no bins or no instruction.
CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "height": SIZE,
    "width": SIZE,
    "frames": _up_to(MAX_FRAMES),
    "fps": _up_to(MAX_FPS),
    "resolution_bins": (_is_bins, "a list of [height, width] or null"),
    "tiling": (_is_tiling, 'an object with "tile" and "stride" in pixels, or null'),
    "max_sequence_length": _up_to(MAX_TOKENS),
    "complex_human_instruction": (_is_lines, "a list of strings or null"),
    "num_inference_steps": _up_to(MAX_STEPS),
    "max_timesteps": (_is_number, f"a number from 0 to {LARGEST_NUMBER}"),
    "intermediate_timesteps": (lambda value: value is None or _is_number(value), "a number or null"),
    "guidance_scale": (_is_number, f"a number from 0 to {LARGEST_NUMBER}"),
    "skip_guidance_layers": (_is_layers, "a list of layer numbers"),
    "skip_layer_guidance_scale": (_is_number, f"a number from 0 to {LARGEST_NUMBER}"),
    "skip_layer_guidance_start": (_is_number, f"a number from 0 to {LARGEST_NUMBER}"),
    "skip_layer_guidance_stop": (_is_number, f"a number from 0 to {LARGEST_NUMBER}"),
    "pag_applied_layers": (_is_layer_names, "the name or number of a layer, or a list of them"),
    "pag_scale": (_is_number, f"a number from 0 to {LARGEST_NUMBER}"),
    "pag_adaptive_scale": (_is_number, f"a number from 0 to {LARGEST_NUMBER}"),
}


def read_defaults(path: Path) -> dict[str, Any]:
    """Read the inference defaults in the file; {} if the file does not exist.

    Raises:
        CheckpointError: the file is not a JSON object, has an unknown key, or has a value of the wrong type.
    """
    if not path.is_file():
        return {}
    defaults = read_json(path)
    for name, value in defaults.items():
        if name not in CHECKS:
            raise CheckpointError(
                f"{path}: unknown key {name!r}", hint=f"the known keys are {', '.join(CHECKS)}"
            )
        is_valid, wanted = CHECKS[name]
        if not is_valid(value):
            raise CheckpointError(
                f"{path}: {name} is {value!r}, but it must be {wanted}",
                hint="correct it, or remove the key to use the family's default",
            )
    return defaults
