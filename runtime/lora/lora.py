"""A LoRA as data: for each weight of a network, two small matrices whose product is added to it.

    W' = W + scale * scaling * B @ A                 scaling is alpha / rank, or alpha / sqrt(rank) for rsLoRA
    W' = m * (W + D) / norm(W + D)                   for DoRA, with D as above and the norm of each row (output channel)

Sources: LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353, equation 5. The
arithmetic is that of peft 0.21.2, `get_delta_weight` and `merge` in tuners/lora/layer.py and variants.py, in fp32.
"""

# O output channels, I input channels, r rank

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ditc.runtime.errors import UsageError
from ditc.runtime.session import Array

ROWS = 256  # of a product at a time: some MB for the widest layers
OTHER_NETWORK = "the LoRA was made for another network: use the checkpoint that it was trained on"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLayer:
    """The change of one weight.

    Attributes:
        key: the module's name in the file, for messages.
        down: A, (r, I) or, for a convolution, (r, I, height, width).
        up: B, (O, r) or (O, r, 1, 1).
        scaling: what B @ A is multiplied by before any scale that the user chooses.
        magnitude: m of DoRA, with O values; None for a plain LoRA.
    """

    key: str
    down: Array
    up: Array
    scaling: float
    magnitude: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes."""
        return (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """One file's changes.

    Attributes:
        name: the file's name.
        sha256: the hash of the file.
        components: for each component of the checkpoint, such as "transformer", the changes of its tensors by name.
    """

    name: str
    sha256: str
    components: Mapping[str, Mapping[str, LoraLayer]]


@dataclass(frozen=True, slots=True)
class ScaledLora:
    """A LoRA and the factor that the user gives to its changes."""

    lora: Lora
    scale: float = 1.0

    @property
    def identity(self) -> str:
        """A text that differs for LoRAs that change weights differently."""
        return f"{self.lora.sha256}:{float(self.scale)!r}"


def described(loras: Iterable[ScaledLora]) -> list[dict[str, object]]:
    """The files, hashes and scales of LoRAs, as pictures carry them."""
    return [{"file": s.lora.name, "sha256": s.lora.sha256, "scale": s.scale} for s in loras]


# A layer, and the user's scale.
Change = tuple[LoraLayer, float]


def changes_of(loras: Iterable[ScaledLora], component: str) -> dict[str, list[Change]]:
    """For each tensor of a component that any of the LoRAs changes, its changes in the order of the LoRAs."""
    found: dict[str, list[Change]] = {}
    for scaled in loras:
        for name, layer in scaled.lora.components.get(component, {}).items():
            found.setdefault(name, []).append((layer, scaled.scale))
    return found


def check_fits(lora: Lora, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Refuse a LoRA that changes a weight which the network does not have, or one of another shape.

    Args:
        shapes: for each component, the shapes of its tensors by name.

    Raises:
        UsageError: the message names the key, and both shapes if there are two.
    """
    for component, layers in lora.components.items():
        if component not in shapes:
            key = next(iter(layers.values())).key
            raise UsageError(
                f"{lora.name} changes {key}, but there is no {component}, only {', '.join(sorted(shapes))}",
                hint=OTHER_NETWORK,
            )
        for name, layer in layers.items():
            shape = shapes[component].get(name)
            if shape is None:
                raise UsageError(
                    f"{lora.name} changes {layer.key}, but the {component} has no {name}", hint=OTHER_NETWORK
                )
            if layer.shape != tuple(shape):
                raise UsageError(
                    f"{lora.name} changes {layer.key} by a weight of shape {layer.shape}, but {name} of the "
                    f"{component} has {tuple(shape)}",
                    hint=OTHER_NETWORK
                    if len(shape) != 4 or shape[1] == layer.shape[1]
                    else f"{OTHER_NETWORK}. The LoRA of a convolution in groups cannot be merged (peft)",
                )


def changed(weight: Array, changes: Sequence[Change]) -> Array:
    """The weight in fp32, with the changes applied one after the other.

    A matrix that is the transposed view of another keeps that order in memory.

    Args:
        weight: of the shape in the checkpoint, (O, I) or (O, I, height, width), as floats that numpy can widen.
    """
    if any(layer.magnitude is not None for layer, _ in changes):
        return _with_dora(weight, changes)
    result: Array = np.array(weight, np.float32, order="K" if weight.ndim == 2 else "C")
    for layer, scale in changes:
        _add_product(result.reshape(result.shape[0], -1), layer, scale)
    return result


def _add_product(weight_OI: Array, layer: LoraLayer, scale: float) -> None:
    """Add the scaled B @ A, a block of rows at a time, which stays in the CPU's cache."""
    left, right = _matrices(layer, scale)
    if not weight_OI.flags.c_contiguous:
        weight_OI, left, right = weight_OI.T, right.T, left.T
    for start in range(0, weight_OI.shape[0], ROWS):
        weight_OI[start : start + ROWS] += left[start : start + ROWS] @ right


def _with_dora(weight: Array, changes: Sequence[Change]) -> Array:
    result: Array = np.array(weight, np.float32, order="C")
    result_OI = result.reshape(result.shape[0], -1)
    # peft takes the norm of the network's own weight, whatever other LoRAs have added before.
    own_OI = result_OI.copy() if len(changes) > 1 else result_OI
    for layer, scale in changes:
        up, down = _matrices(layer, scale)
        delta_OI = up @ down
        if layer.magnitude is None:
            result_OI += delta_OI
            continue
        trained_OI = own_OI + delta_OI
        result_OI += delta_OI
        norm_O = np.sqrt(np.einsum("oi,oi->o", trained_OI, trained_OI))
        result_OI *= (layer.magnitude / norm_O)[:, None]
    return result


def _matrices(layer: LoraLayer, scale: float) -> tuple[Array, Array]:
    """B with all factors, (O, r), and A, (r, I), where a convolution's I has its kernel's places too."""
    rank = layer.down.shape[0]
    return layer.up.reshape(-1, rank) * np.float32(layer.scaling * scale), layer.down.reshape(rank, -1)
