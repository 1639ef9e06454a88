"""The LoRAs that a server offers: each bundle that one fits is served once more, as MODEL@NAME.

Requests with different LoRAs never share a run. Where a LoRA can be an input of the bundle's graphs, its requests share
the sessions, the memory and the queue of the bundle. Otherwise it is a model of its own, with the LoRA in its weights:
it is opened when it is first asked for, and closed for others, within the memory budget, as all models are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose_here
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.lora import ScaledLora
from ditc.runtime.lora.lora_file import read_lora
from ditc.runtime.lora.reopener import Reopener

log = logging.getLogger(__name__)

# Between the name of a model and that of a LoRA. No name of a bundle has one.
SEPARATOR = "@"


@dataclass(frozen=True, slots=True)
class ServedLora:
    """A LoRA with which a bundle is served.

    Attributes:
        bundle: the name of the bundle.
        shares: whether it is an input of the bundle's graphs, so that it needs no sessions of its own.
    """

    bundle: str
    choice: LoraChoice
    shares: bool


def lora_variants(
    bundles: Mapping[str, Path], loras: Mapping[str, LoraChoice], load: LoadOptions, *, share: bool = True
) -> dict[str, ServedLora]:
    """What is served for each LoRA, by the names of the models.

    Args:
        share: whether LoRAs may be inputs.

    Raises:
        UsageError: a file is no LoRA, or it fits none of the bundles.
        DitcError: a manifest or a weight map cannot be read.
    """
    found: dict[str, ServedLora] = {}
    for name, choice in loras.items():
        file = read_lora(choice.file)
        refusal: UsageError | None = None
        for bundle, path in bundles.items():
            manifest = load_manifest(path)
            artifacts, _ = choose_here(path, manifest, load)
            variant = f"{bundle}{SEPARATOR}{name}"
            try:
                reopener = Reopener(path, manifest, artifacts, load)
                loras_there = [ScaledLora(reopener.resolved(file), choice.scale)]
                why = reopener.why_no_inputs(loras_there) if share else "replicas open it by itself"
            except UsageError as e:
                refusal = e
                continue
            if why:
                log.info("%s is a model of its own: %s", variant, why)
            found[variant] = ServedLora(bundle, choice, not why)
        if refusal is not None and not any(key.endswith(f"{SEPARATOR}{name}") for key in found):
            raise refusal
    return found
