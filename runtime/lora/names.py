"""Which weights of a network a LoRA's keys mean, whichever names the file uses.

    transformer.transformer_blocks.0.attn1.to_q         diffusers: the component, and the module's name there
    blocks.0.attn.qkv                                   the family's own: one module may hold several of diffusers'
    base_model.model.blocks.0.attn.qkv                  peft's own files: either name, without a component
    diffusion_model.blocks.0.attn.qkv                   ComfyUI's name for the denoising network
    lora_unet_blocks_0_attn_qkv                         kohya's: either name, with underscores for dots

Which names a network has is data: the checkpoint's tensors, and the native names of the bundle's weight maps. A key
that means no weight, or more than one, is refused. Where q, k and v are one module of the native network, they share A,
and each has its rows of B: the same arithmetic as that of three modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ditc.runtime.errors import UsageError
from ditc.runtime.lora.lora import OTHER_NETWORK, Lora, LoraLayer, check_fits
from ditc.runtime.lora.lora_file import PEFT_PREFIX, LoraFile
from ditc.runtime.session import Array
from ditc.runtime.weight_map import NativeName

# The component of the denoising network.
TRANSFORMER = "transformer"
COMFYUI = "diffusion_model."
# How kohya's names begin, and the component each stands for (kohya-ss/sd-scripts, networks/lora.py and its
# siblings for newer networks; OneTrainer writes lora_transformer_).
KOHYA = {
    "lora_unet_": TRANSFORMER,
    "lora_transformer_": TRANSFORMER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
WEIGHT = ".weight"

# The tensor of the checkpoint, and which rows of the LoRA's change are its own.
_Place = tuple[str, NativeName]


@dataclass(frozen=True)
class KnownWeights:
    """The weights that LoRAs may change.

    Attributes:
        shapes: for each component of the checkpoint, the shapes of its tensors by name.
        native: where the family's own files hold the transformer's tensors, by their names in the checkpoint.
    """

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    native: Mapping[str, NativeName]
    _places: dict[str, dict[str, list[list[_Place]]]] = field(default_factory=dict, init=False, repr=False)

    def places(self, component: str, module: str, *, flat: bool) -> list[list[_Place]]:
        """The weights that a module's name can mean, each as its parts; [] for an unknown name.

        Args:
            flat: whether the name has underscores for dots.
        """
        if component not in self.shapes:
            return []
        table = f"{component} {flat}"
        if table not in self._places:
            self._places[table] = self._table(component, flat=flat)
        return self._places[table].get(module, [])

    def _table(self, component: str, *, flat: bool) -> dict[str, list[list[_Place]]]:
        own = {
            name.removesuffix(WEIGHT): [(name, NativeName(name=name))]
            for name in self.shapes[component]
            if name.endswith(WEIGHT)
        }
        fused: dict[str, list[_Place]] = defaultdict(list)
        for tensor, native in self.native.items() if component == TRANSFORMER else ():
            if native.name.endswith(WEIGHT) and tensor in self.shapes[component]:
                fused[native.name.removesuffix(WEIGHT)].append((tensor, native))
        found: dict[str, list[list[_Place]]] = defaultdict(list)
        for names in (own, fused):
            for module, places in names.items():
                meant = found[module.replace(".", "_") if flat else module]
                if {tensor for tensor, _ in places} not in [{tensor for tensor, _ in p} for p in meant]:
                    meant.append(places)
        return dict(found)


def resolved(file: LoraFile, known: KnownWeights) -> Lora:
    """The LoRA under the checkpoint's names.

    Raises:
        UsageError: a key means no weight of the network, more than one, one that another key changes too, or one of
            another shape. The message names the key.
    """
    components: dict[str, dict[str, LoraLayer]] = defaultdict(dict)
    for key, layer in file.layers.items():
        component, places = _place(file.name, key, known)
        for tensor, native in places:
            if tensor in components[component]:
                raise UsageError(
                    f"{file.name} changes {tensor} of the {component} twice: by {components[component][tensor].key} "
                    f"and by {key}",
                    hint="two files are mixed in it",
                )
            components[component][tensor] = _rows(file.name, layer, native)
    lora = Lora(name=file.name, sha256=file.sha256, components=dict(components))
    check_fits(lora, known.shapes)
    return lora


def _place(file: str, key: str, known: KnownWeights) -> tuple[str, list[_Place]]:
    """The component whose weight a key means, and the parts of this weight."""
    found = [
        (component, places)
        for component, module, flat in _readings(key, known.shapes)
        for places in known.places(component, module, flat=flat)
    ]
    if len(found) == 1:
        component, places = found[0]
        parts = {native.part for _, native in places}
        if parts != set(range(places[0][1].parts)):
            raise UsageError(
                f"{file} changes {key}, and the network has only the parts {sorted(parts)} of it",
                hint="build the bundle again",
            )
        return component, places
    if found:
        names = ", ".join(f"{places[0][0].removesuffix(WEIGHT)} of the {c}" for c, places in found)
        raise UsageError(
            f"{file} changes {key}, which can mean {names}",
            hint="save the LoRA with pipe.save_lora_weights(), whose names begin with the component",
        )
    raise _unknown(file, key, known)


def _readings(key: str, components: Iterable[str]) -> list[tuple[str, str, bool]]:
    """The component and the module's name there, for each way to read a key; and whether dots are underscores."""
    for prefix, component in KOHYA.items():
        if key.startswith(prefix):
            return [(component, key.removeprefix(prefix), True)]
    bare = key.removeprefix(PEFT_PREFIX)
    if bare.startswith(COMFYUI):
        return [(TRANSFORMER, bare.removeprefix(COMFYUI), False)]
    first, _, inner = bare.partition(".")
    named = [(first, inner, False)] if first in components else []
    return [*named, *((component, bare, False) for component in components)]


def _unknown(file: str, key: str, known: KnownWeights) -> UsageError:
    component, module, _ = _readings(key, known.shapes)[0]
    if key.startswith(tuple(KOHYA)):
        what = f"the {component} has no module of this name" if component in known.shapes else None
    elif key.startswith((PEFT_PREFIX, COMFYUI)):
        what = "no network has a module of this name"
    else:
        component, _, module = key.partition(".")
        what = f"the {component} has no {module}{WEIGHT}" if component in known.shapes else None
        if component not in (*known.shapes, *KOHYA.values()):
            what = "no network has a module of this name"
    what = what or f"there is no {component}, only {', '.join(sorted(known.shapes))}"
    hint = OTHER_NETWORK
    if not known.native:
        hint += "; the family's own names are not known here, and a bundle of an earlier version has to be built again"
    return UsageError(f"{file} changes {key}, but {what}", hint=hint)


def _rows(file: str, layer: LoraLayer, native: NativeName) -> LoraLayer:
    """The part of a change that belongs to one part of a native tensor. A is shared."""
    if native.parts == 1 and not native.swapped:
        return layer
    outputs = layer.up.shape[0]
    if outputs % native.parts or (native.swapped and outputs % 2):
        raise UsageError(
            f"{file} changes {layer.key}, whose {outputs} output channels cannot be divided into "
            f"{max(native.parts, 2)} equal parts",
            hint=OTHER_NETWORK,
        )

    def own(values: Array) -> Array:
        if native.swapped:
            first, second = np.split(values, 2)
            values = np.concatenate((second, first))
        return np.ascontiguousarray(np.split(values, native.parts)[native.part])

    magnitude = None if layer.magnitude is None else own(layer.magnitude)
    return replace(layer, up=own(layer.up), magnitude=magnitude)
