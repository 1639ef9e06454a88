"""The LoRAs that a server offers: each bundle that one fits is served once more, with the LoRA in its weights.

A variant is a model of its own, with its own scheduler: requests with different LoRAs never share a run. Variants are
opened when they are first asked for, and closed for others, within the memory budget, as all models are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose_here
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.lora import ScaledLora
from ditc.runtime.lora.lora_file import read_lora
from ditc.runtime.lora.reopener import Reopener

# Between the name of a model and that of a LoRA. No name of a bundle has one.
SEPARATOR = "@"


def lora_variants(
    bundles: Mapping[str, Path], loras: Mapping[str, LoraChoice], load: LoadOptions
) -> dict[str, tuple[str, LoraChoice]]:
    """For the name of each variant, the name of the bundle and the LoRA.

    Raises:
        UsageError: a file is no LoRA, or it fits none of the bundles.
        DitcError: a manifest or a weight map cannot be read.
    """
    found: dict[str, tuple[str, LoraChoice]] = {}
    for name, choice in loras.items():
        file = read_lora(choice.file)
        refusal: UsageError | None = None
        for bundle, path in bundles.items():
            manifest = load_manifest(path)
            artifacts, _ = choose_here(path, manifest, load)
            try:
                reopener = Reopener(path, manifest, artifacts, load)
                reopener.stages_of([ScaledLora(reopener.resolved(file), choice.scale)])
            except UsageError as e:
                refusal = e
                continue
            found[f"{bundle}{SEPARATOR}{name}"] = (bundle, choice)
        if refusal is not None and not any(key.endswith(f"{SEPARATOR}{name}") for key in found):
            raise refusal
    return found
