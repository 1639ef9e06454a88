"""LoRAs in a bundle's weights: the reference must have the same, and changed weights are compared by their change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from ditc.export.checkpoint.loras import read_choices
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.safetensors_file import safetensors_path
from ditc.export.families import find_family
from ditc.runtime.bundle.manifest import Manifest
from ditc.runtime.errors import UsageError
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.lora_file import read_lora
from ditc.runtime.spec import DENOISER
from ditc.runtime.weight_map import read_weight_map

# How far two programs may round the sum of a weight and a LoRA's product apart, in units of the last place of the
# graph's type: each rounds once, and a product that BLAS sums in another order can fall on the other side.
LAST_PLACES = 2
# The product's own rounding, as a fraction of the largest value: fp32 sums of up to 4,096 terms.
PRODUCT = 1e-6
# A change that is a multiple of another one: what is left after the multiple is taken away, as a fraction.
EXPLAINED = 1e-2


def loras_to_give(bundle: Path, manifest: Manifest, loras: Sequence[LoraChoice]) -> tuple[LoraChoice, ...]:
    """Which of the LoRAs the bundle gets as inputs: all, if its graphs take some and its weights hold none.

    Raises:
        UsageError: a file is no LoRA; or as `check_same_loras`, if the bundle gets none.
        BundleError: a weight map is missing or damaged.
    """
    if not manifest.loras and takes_loras(bundle, manifest):
        for choice in loras:
            read_lora(choice.file)  # a file that is no LoRA is refused before any work
        return tuple(loras)
    check_same_loras(manifest, loras)
    return ()


def takes_loras(bundle: Path, manifest: Manifest) -> bool:
    """Whether a denoiser of the bundle takes LoRAs as inputs."""
    maps = [a.weights for a in manifest.stages[DENOISER].artifacts if a.weights is not None]
    return any(weight.lora is not None for ref in maps for weight in read_weight_map(bundle / ref.path))


def check_same_loras(manifest: Manifest, loras: Sequence[LoraChoice]) -> None:
    """Refuse to compare a bundle with a checkpoint that has other LoRAs than those in the bundle's weights.

    Raises:
        UsageError: the message names files, hashes and scales; or a file is no LoRA.
    """
    built = [(lora.sha256, lora.scale) for lora in manifest.loras]
    there = [choice for choice in loras if choice.file.is_file()]
    given = [(read_lora(choice.file).sha256, float(choice.scale)) for choice in there]
    if built == given and len(given) == len(loras):
        return
    has = (
        ", ".join(f"{lora.file}:{lora.scale:g} ({lora.sha256[:12]})" for lora in manifest.loras) or "no LoRA"
    )
    asked = ", ".join(f"{choice.file}:{choice.scale:g}" for choice in loras) or "none"
    if len(given) == len(loras) and given:
        asked = ", ".join(f"{c.file}:{c.scale:g} ({h[:12]})" for c, (h, _) in zip(loras, given, strict=True))
    raise UsageError(
        f"the bundle has {has} in its weights, and --lora gives {asked}",
        hint="give the files that the bundle was built with, with the same scales and in the same order"
        if manifest.loras
        else "leave --lora out, or build the bundle with it: ditc build CHECKPOINT -o BUNDLE --lora FILE; a bundle "
        "that was built with --lora-inputs gets it as an input",
    )


def in_diffusers_form(choice: LoraChoice, checkpoint: Checkpoint, folder: Path) -> Path:
    """The file, or if diffusers does not read its names, the same LoRA under diffusers' names, written into the folder.

    B is then written with all factors, so that alpha is the rank. The names are ours, and the arithmetic is diffusers'.

    Raises:
        UsageError: the file is no LoRA, or does not fit the checkpoint.
    """
    if all(key.partition(".")[0] in checkpoint.components for key in read_lora(choice.file).layers):
        return choice.file
    native = find_family(checkpoint).native_names(checkpoint)
    lora = read_choices([choice], checkpoint, native)[0].lora
    tensors = {}
    for component, layers in lora.components.items():
        for name, layer in layers.items():
            module = f"{component}.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = layer.down
            tensors[f"{module}.lora_B.weight"] = layer.up * np.float32(layer.scaling)
            if layer.magnitude is not None:
                tensors[f"{module}.lora_magnitude_vector"] = layer.magnitude
    file = folder / f"{lora.sha256[:12]}.safetensors"
    with safetensors_path(file, hint="make room in the folder for temporary files") as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, partial)
    return file


def rounds_alike(stored: Tensor, wanted: Tensor) -> bool:
    """Whether a changed weight of a graph is the wanted one, up to the rounding of the change and of the type."""
    wide = wanted.float()
    places = LAST_PLACES * torch.finfo(stored.dtype).eps
    return torch.allclose(stored.float(), wide, rtol=places, atol=PRODUCT * float(wide.abs().max()))


def change_cause(stored: Tensor, wanted: Tensor, plain: Tensor) -> str:
    """Why a changed weight is wrong, if its change is a multiple of the right one; "" if it is not.

    Args:
        plain: the weight without LoRAs. All have the same shape.
    """
    got, right = (tensor.double() - plain.double() for tensor in (stored, wanted))
    size = float((right * right).sum())
    if not size:
        return ""
    factor = float((got * right).sum()) / size
    if float((got - factor * right).norm()) > EXPLAINED * float(got.norm() + right.norm()):
        return ""
    if abs(factor) < EXPLAINED:
        return "the LoRA is not in the weights"
    return (
        f"the LoRA's change is {factor:.4g} times the reference's: its alpha, its scale, or one of several LoRAs was "
        "ignored"
    )
