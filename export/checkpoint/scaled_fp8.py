"""Scaled FP8 weights, as ComfyUI, diffusers and vLLM save them: 8-bit floats beside the scale that multiplies them.

    NAME.weight                            float8_e4m3fn or float8_e5m2
    NAME.scale_weight or .weight_scale     one number, or one for each row (output channel) of the weight
    NAME.scale_input or .input_scale       the scale of 8-bit activations; ditc's graphs have none, so it is not needed
    NAME.comfy_quant                       ComfyUI's note on the format, as JSON in bytes
    scaled_fp8                             ComfyUI's mark that the file is of this kind

Sources: ComfyUI, comfy/ops.py (scaled_fp8_ops, and mixed_precision_ops for comfy_quant); diffusers 0.42.1,
quantizers/bfl/utils.py (dequantize_fp8r).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from ditc.export.checkpoint.tensors import TensorEntry
from ditc.runtime.errors import CheckpointError

log = logging.getLogger(__name__)

FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")  # _inv is a factor too (transformers, DeepSeek)
MARK, NOTE = "scaled_fp8", "comfy_quant"
UNUSED = ("scale_input", "input_scale", NOTE)
NOTE_FORMATS = ("float8_e4m3fn", "float8_e5m2")
FULL_PRECISION = "use the weights of the same model in bf16 or fp16"


def dequantized(place: Path, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors with every scaled weight as fp32, value times scale, which is exact. All others stay as they are.

    Raises:
        CheckpointError: a scale is neither one number nor one for each row of its weight.
    """
    kept = {name: entry for name, entry in entries.items() if name.rpartition(".")[2] != MARK}
    scaled = 0
    for name, weight in entries.items():
        module, _, kind = name.rpartition(".")
        if kind == NOTE:
            _check_note(place, module, weight)
        if kind != "weight" or weight.dtype not in FP8:
            continue
        for unused in UNUSED:
            kept.pop(f"{module}.{unused}", None)
        for scale in SCALES:
            if f"{module}.{scale}" in kept:
                _check_scale(place, f"{module}.{scale}", kept[f"{module}.{scale}"], weight)
                kept[name] = _product(weight, kept.pop(f"{module}.{scale}"))
                scaled += 1
    if scaled:
        log.info("%s: %d weights are scaled FP8; they are read as fp32, value times scale", place, scaled)
    return kept


def _check_scale(place: Path, name: str, scale: TensorEntry, weight: TensorEntry) -> None:
    rows = weight.shape[:1]
    if scale.shape not in ((), (1,), (1, 1), rows, (*rows, 1)):
        raise CheckpointError(
            f"{place}: {name} has shape {list(scale.shape)}, but ditc reads one scale for a whole weight or one for "
            f"each of its rows, and the weight has shape {list(weight.shape)}",
            hint=FULL_PRECISION,
        )


def _check_note(place: Path, module: str, note: TensorEntry) -> None:
    if (found := _format(note)) not in NOTE_FORMATS:
        raise CheckpointError(
            f"{place}: {module} is quantized as {found}, but ditc reads only {' and '.join(NOTE_FORMATS)}",
            hint=FULL_PRECISION,
        )


def _format(note: TensorEntry) -> str:
    try:
        return str(json.loads(bytes(note.load().flatten().tolist())).get("format"))
    except (ValueError, AttributeError):
        return "an unknown format"


def _product(weight: TensorEntry, scale: TensorEntry) -> TensorEntry:
    def load() -> torch.Tensor:
        factor = scale.load().to(torch.float32).reshape(-1, *(1,) * (len(weight.shape) - 1))
        return weight.load().to(torch.float32) * factor

    return TensorEntry(weight.shape, torch.float32, load)
