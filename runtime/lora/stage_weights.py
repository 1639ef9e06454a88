"""The changed weights of one stage: from the graph's own values, the weight map and the LoRAs, one weight at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ditc.runtime.bundle.onnx_initializers import Initializer, read_initializers
from ditc.runtime.errors import BundleError
from ditc.runtime.lora.eight_bits import requantized
from ditc.runtime.lora.lora import Change, changed
from ditc.runtime.number_formats import rounded_as, widened
from ditc.runtime.session import Array
from ditc.runtime.weight_map import Weight, apply, invert, is_lossless


class StoredWeights:
    """The weights of a graph, read from its files when they are asked for.

    Args:
        graph: the .onnx file, with its external data beside it.
        weights: its weight map.
    """

    def __init__(self, graph: Path, weights: Sequence[Weight]) -> None:
        self._graph, self.weights = graph, weights
        self._initializers = read_initializers(graph)
        self._by_name = {weight.checkpoint: weight for weight in weights}

    def stored(self, name: str) -> Array:
        """The values of an initializer, mapped from its file; bf16 and FP8 numbers as their bits.

        Raises:
            BundleError: the graph has no such initializer, or its file is too short.
        """
        return self._initializer(name).read()

    def original(self, checkpoint: str) -> Array | None:
        """A tensor in the checkpoint's shape, in fp32 or fp16; None if the graph does not hold it, or in 8 bits."""
        weight = self._by_name.get(checkpoint)
        if weight is None or not is_lossless(weight):
            return None
        stored = self.stored(weight.initializer)
        return invert(weight, widened(stored) if stored.dtype == np.uint16 else stored)

    def _initializer(self, name: str) -> Initializer:
        found = self._initializers.get(name)
        if found is None:
            raise BundleError(
                f"{self._graph} has no initializer {name}, which its weight map names",
                hint="build the bundle again",
            )
        return found


def changed_initializers(
    graph: StoredWeights, changes: Mapping[str, Sequence[Change]], originals: StoredWeights | None = None
) -> Iterator[tuple[str, Array]]:
    """The name of each initializer that the changes touch, and its new values in its own shape and type.

    Weights in 8 bits get new codes and new scales. Numbers of bf16 and FP8 are uint16 and uint8 arrays of their bits.

    Args:
        changes: by the checkpoint's names.
        originals: a graph of the same weights that holds them in more than 8 bits, from which sums are rounded once.

    Raises:
        BundleError: a graph does not hold what its weight map says.
    """
    for weight in graph.weights:
        parts = changes.get(weight.checkpoint)
        if parts is None:
            continue
        if is_lossless(weight):
            own = graph.original(weight.checkpoint)
            assert own is not None
            stored = graph.stored(weight.initializer)
            new = apply(weight, changed(own, parts), stored_shape=stored.shape)
            yield weight.initializer, np.ascontiguousarray(rounded_as(new, stored.dtype))
            continue
        how = weight.codes
        names = () if how is None else (how.scale, *((how.reciprocals,) if how.reciprocals else ()))
        initializers = {name: graph.stored(name) for name in (weight.initializer, *names)}
        original = None if originals is None else originals.original(weight.checkpoint)
        yield from requantized(weight, initializers, parts, original).items()
