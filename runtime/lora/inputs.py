"""LoRAs as inputs of a graph: a switch gives a session other small matrices, and no weight changes.

A graph of `ditc build --lora-inputs` computes x @ W + (x @ A) @ B for each matrix W (graph/passes/lora_inputs.py of the
exporter). Several LoRAs of one matrix act as one, whose rank is the sum of theirs: (A1 A2) beside each other, and
(B1 B2) below each other. DoRA cannot be written as such a sum, because it gives the rows of W other lengths.
"""

# I input channels, O output channels, r rank

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        feeds: the matrices, by the names of the inputs.
    """

    def __init__(self, base: Session, feeds: Mapping[str, Array]) -> None:
        self.base, self._feeds = base, dict(feeds)

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
        return self.base.run({**feeds, **self._feeds})

    def close(self) -> None:
        """Release everything. The stage cannot run any more."""
        self._feeds = {}
        self.base.close()


def lora_feeds(
    session: Session, weights: Sequence[Weight], changes: Mapping[str, Sequence[Change]]
) -> dict[str, Array] | None:
    """The inputs with which the session computes with the changes; None if it has none for all of them.

    Args:
        changes: by the checkpoint's names.
    """
    if not isinstance(session, OptionalInputs):
        return None
    types, feeds = session.optional_inputs, {}
    for weight in weights:
        parts = changes.get(weight.checkpoint)
        if parts is None:
            continue
        names = weight.lora
        if names is None or not {names.down, names.up} <= types.keys():
            return None
        if any(layer.magnitude is not None for layer, _ in parts):
            return None
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
