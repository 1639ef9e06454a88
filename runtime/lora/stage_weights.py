"""The changed weights of one stage: from the graph's own values, the weight map and the LoRAs, one weight at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ditc.runtime.bundle.onnx_initializers import read_initializers
from ditc.runtime.errors import BundleError, UsageError
from ditc.runtime.lora.lora import Change, changed
from ditc.runtime.session import Array
from ditc.runtime.weight_map import Weight, apply, invert, is_lossless


def check_replaceable(weights: Sequence[Weight], changes: Mapping[str, Sequence[Change]]) -> None:
    """Refuse changes of weights that the graph stores in 8 bits.

    Raises:
        UsageError: the message names the weight.
    """
    for weight in weights:
        if weight.checkpoint in changes and not is_lossless(weight):
            raise UsageError(
                f"a LoRA changes {weight.checkpoint}, which the {weight.stage} stores in 8 bits: the sum could only be "
                "rounded to the levels of the unchanged weights",
                hint="build the bundle with the LoRA (ditc build --lora), which quantizes the sum; or load the bundle "
                "with another --precision",
            )


def changed_initializers(
    graph: Path, weights: Sequence[Weight], changes: Mapping[str, Sequence[Change]]
) -> Iterator[tuple[str, Array]]:
    """The name of each initializer that the changes touch, and its new values in its own shape and type.

    bf16 values are uint16 arrays of their bits.

    Args:
        changes: by the checkpoint's names.

    Raises:
        BundleError: the graph does not hold what the weight map says.
    """
    initializers = read_initializers(graph)
    for weight in weights:
        parts = changes.get(weight.checkpoint)
        if parts is None:
            continue
        initializer = initializers.get(weight.initializer)
        if initializer is None:
            raise BundleError(
                f"{graph} has no initializer {weight.initializer}, which its weight map names",
                hint="build the bundle again",
            )
        stored = initializer.read()
        is_bf16 = stored.dtype == np.uint16
        own = invert(weight, _widened(stored) if is_bf16 else stored)
        new = apply(weight, changed(own, parts), stored_shape=stored.shape)
        typed = _as_bf16(new) if is_bf16 else new.astype(stored.dtype, copy=False)
        yield weight.initializer, np.ascontiguousarray(typed)


def _widened(bits: Array) -> Array:
    wide: Array = (np.asarray(bits, np.uint32) << 16).view(np.float32)
    return wide


def _as_bf16(values: Array) -> Array:
    """The bits of finite values, rounded to the nearest bf16 number, to an even one where two are equally near."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded
