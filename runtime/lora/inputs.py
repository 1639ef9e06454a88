"""LoRAs as inputs of a graph: a switch gives a session other small matrices, and no weight changes.

A graph of `ditc build --lora-inputs` computes x @ W + (x @ A) @ B for each matrix W (graph/passes/lora_inputs.py of the
exporter). Several LoRAs of one matrix act as one, whose rank is the sum of theirs: (A1 A2) beside each other, and
(B1 B2) below each other. DoRA cannot be written as such a sum, because it gives the rows of W other lengths.
"""

# I input channels, O output channels, r rank

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from ditc.runtime.lora.lora import Change
from ditc.runtime.number_formats import rounded_as
from ditc.runtime.session import Array, ComputeDevice, Session, Tensor
from ditc.runtime.spec import StageSpec
from ditc.runtime.weight_map import Weight


@runtime_checkable
class OptionalInputs(Protocol):
    """A session whose graph has inputs besides those of the spec, which may be left out."""

    @property
    def optional_inputs(self) -> Mapping[str, np.dtype[np.generic]]:
        """Their element types, by name."""
        ...


class WithLoras:
    """A session that adds the matrices of LoRAs to the inputs of every run.

    Args:
        base: a session with OptionalInputs, which is closed with this one.
        matrices: returns the matrices, by the names of the inputs. It is called before every run.
    """

    def __init__(self, base: Session, matrices: Callable[[], Mapping[str, Array]]) -> None:
        self.base, self.matrices = base, matrices

    @property
    def spec(self) -> StageSpec:
        """The spec of the stage."""
        return self.base.spec

    @property
    def device(self) -> ComputeDevice:
        """Where it computes."""
        return self.base.device

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the stage once, with the LoRAs."""
        return self.base.run({**feeds, **self.matrices()})

    def close(self) -> None:
        """Release everything. The stage cannot run any more."""
        self.base.close()


def why_no_inputs(
    weights: Sequence[Weight], changes: Mapping[str, Sequence[Change]], known: Collection[str] | None = None
) -> str:
    """Why a graph cannot take the changes as inputs, in words that name a key; "" if it can.

    Args:
        weights: the weight map of the graph.
        changes: by the checkpoint's names.
        known: the names of the optional inputs that a session of the graph has; None takes those of the map.
    """
    for weight in weights:
        for layer, _ in changes.get(weight.checkpoint, ()):
            names = weight.lora
            if names is None or (known is not None and not {names.down, names.up} <= set(known)):
                return f"{layer.key} changes {weight.checkpoint}, for which the {weight.stage} has no input"
            if layer.magnitude is not None:
                return f"{layer.key} is a DoRA, which gives the rows of a weight other lengths"
    return ""


def lora_feeds(
    session: Session, weights: Sequence[Weight], changes: Mapping[str, Sequence[Change]]
) -> dict[str, Array] | None:
    """The inputs with which the session computes with the changes; None if it has none for all of them.

    Args:
        changes: by the checkpoint's names.
    """
    types = session.optional_inputs if isinstance(session, OptionalInputs) else {}
    if why_no_inputs(weights, changes, types.keys()):
        return None
    feeds: dict[str, Array] = {}
    for weight in weights:
        parts, names = changes.get(weight.checkpoint), weight.lora
        if parts is None or names is None:
            continue
        downs = [layer.down.reshape(layer.down.shape[0], -1) for layer, _ in parts]
        ups = [
            layer.up.reshape(layer.up.shape[0], -1) * np.float32(layer.scaling * scale)
            for layer, scale in parts
        ]
        feeds[names.down] = _stored(np.concatenate(downs).T, types[names.down])
        feeds[names.up] = _stored(np.concatenate(ups, axis=1).T, types[names.up])
    return feeds


def _stored(matrix: Array, dtype: np.dtype[np.generic]) -> Array:
    return np.ascontiguousarray(rounded_as(matrix, dtype))
