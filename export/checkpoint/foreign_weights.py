"""Weights that are not a network's own: LoRAs and quantized formats, told by tensors' names or by config.json."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ditc.export.checkpoint.tensors import TensorEntry
from ditc.runtime.errors import CheckpointError

log = logging.getLogger(__name__)

FUSE = (
    "give it beside its checkpoint: ditc build CHECKPOINT -o BUNDLE --lora FILE, or ditc run BUNDLE --lora FILE; or "
    "fuse it with diffusers: pipe.load_lora_weights(FILE); pipe.fuse_lora(); pipe.unload_lora_weights(); "
    "pipe.save_pretrained(OUT)"
)
UNQUANTIZED = (
    "use the weights of the same model in bf16 or fp16; a build makes the denoiser smaller with --precision"
)
DEQUANTIZE = (
    f"{UNQUANTIZED}. If there are none, load the component with its library, call dequantize() on it and "
    "save_pretrained(): the values stay those of the quantized model"
)


@dataclass(frozen=True, slots=True)
class Foreign:
    """A kind of weights that ditc does not read.

    Attributes:
        what: the kind, as an error names it.
        names: finds the names of tensors that only this kind has.
        method: quant_method in a config.json's quantization_config; "" where the kind is no quantization.
    """

    what: str
    names: re.Pattern[str]
    hint: str
    method: str = ""


def _foreign(what: str, names: str, hint: str, method: str = "") -> Foreign:
    return Foreign(what, re.compile(names), hint, method)


# The names are peft's, diffusers' own older ones, kohya's and LyCORIS'.
LORA = _foreign(
    "a LoRA",
    r"\.lora_[AB]\.|[._]lora[._](up|down)\.|lora_linear_layer|^lora_(unet|te\d?|transformer)_|\.lora_magnitude_vector"
    r"|\.dora_scale$|\.hada_w[12]|\.lokr_w[12]",
    FUSE,
)
# The first that fits is named, so the more special ones come first.
KINDS = (
    LORA,
    _foreign(
        "bitsandbytes 4-bit weights",
        r"\.quant_state\.bitsandbytes__|\.absmax$|\.quant_map$",
        DEQUANTIZE,
        "bitsandbytes",
    ),
    _foreign("bitsandbytes 8-bit weights", r"\.SCB$|\.weight_format$", DEQUANTIZE, "bitsandbytes"),
    _foreign("Nunchaku's 4-bit weights", r"\.wscales$|\.smooth_factor(_orig)?$", UNQUANTIZED, "svdquant"),
    _foreign("GPTQ weights", r"\.g_idx$", UNQUANTIZED, "gptq"),
    _foreign("AWQ weights", r"\.qweight$|\.qzeros$", UNQUANTIZED, "awq"),
    _foreign("quanto weights", r"\.weight\._(data|scale|shift)$", UNQUANTIZED, "quanto"),
    _foreign("torchao weights", r"[._:]weight[._:]q?data$|_weight_qdata$", DEQUANTIZE, "torchao"),
    _foreign("packed weights of compressed-tensors", r"\.weight_packed$", UNQUANTIZED, "compressed-tensors"),
    _foreign("HQQ weights", r"\.W_q$", UNQUANTIZED, "hqq"),
    _foreign("NVFP4 weights", r"\.weight_scale_2$|\.weight_global_scale$", UNQUANTIZED, "nvfp4"),
)
# Methods of quantization_config whose weights may be scaled FP8, which is read. What else they hold, the names tell.
MAYBE_FP8 = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"})


def check_foreign(place: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError, which says what the tensors are, if they are of a kind that ditc does not read.

    Args:
        place: the file or folder of the tensors.
    """
    for kind in KINDS:
        found = next((name for name in entries if kind.names.search(name)), None)
        if found is not None:
            raise CheckpointError(f"{place} holds {kind.what}, such as {found}", hint=kind.hint)
    for name, entry in entries.items():
        if name.endswith(".weight") and not entry.dtype.is_floating_point:
            raise CheckpointError(
                f"{place} holds quantized weights: {name} has the element type "
                f"{str(entry.dtype).removeprefix('torch.')}",
                hint=UNQUANTIZED,
            )


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the component's config.json names a quantization that ditc does not read."""
    given = config.get("quantization_config")
    if not isinstance(given, Mapping):
        return
    method = str(given.get("quant_method", "an unnamed method"))
    if method in MAYBE_FP8:
        return
    bits = "".join(f" in {bits} bits" for bits in (4, 8) if given.get(f"load_in_{bits}bit"))
    hint = next((kind.hint for kind in KINDS if kind.method == method), UNQUANTIZED)
    raise CheckpointError(
        f"{path}: the component is quantized with {method}{bits} (quantization_config)", hint=hint
    )


def check_adapter(directory: Path) -> None:
    """Raise CheckpointError if the component has an adapter of peft, which transformers applies to its weights."""
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        raise CheckpointError(
            f"{adapter} makes transformers apply an adapter (a LoRA) to the weights, which ditc does not do",
            hint="merge it into the weights: peft's merge_and_unload(), then save_pretrained(); or remove the file",
        )


def warn_of_loras(path: Path, read: Collection[Path]) -> None:
    """Warn of every LoRA in the checkpoint's folders. It is left out, as in diffusers' from_pretrained.

    Args:
        read: the files whose weights are used.
    """
    for file in sorted({*path.glob("*.safetensors"), *path.glob("*/*.safetensors")} - set(read)):
        try:
            with safe_open(file, framework="pt") as opened:
                is_lora = any(LORA.names.search(name) for name in opened.keys())  # noqa: SIM118 (it is not a mapping)
        except (SafetensorError, OSError):
            continue  # a file that nobody reads may be damaged
        if is_lora:
            log.warning("%s is a LoRA and is left out. To draw with it, %s", file, FUSE)
