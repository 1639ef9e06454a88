"""Protects the network's own weights from optimizers, and records the transforms that made their stored form.

torch.export names every parameter and buffer by its module path. LoRA, refit, Q/DQ placement and parity find weights
by that name. So no pass may rename, merge, fold or drop a weight because of the values that it happens to hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir

from ditc.runtime.weight_map import Transform

# The metadata key of an initializer in the ONNX file that lists its transforms, in the order they were applied.
TRANSFORMS = "ditc.transforms"


@contextmanager
def hidden_values(initializers: Mapping[str, ir.Value]) -> Iterator[None]:
    """Hide the initializers' values within a `with` block, so that an optimizer cannot act on them.

    Their names, shapes and types stay.
    """
    tensors = [(value, value.const_value) for value in initializers.values()]
    for value, _ in tensors:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in tensors:
            value.const_value = tensor


def transforms_of(value: ir.Value) -> tuple[Transform, ...]:
    """The transforms that made this initializer from the parameter, in the order they were applied."""
    return tuple(Transform(part) for part in value.metadata_props.get(TRANSFORMS, "").split(",") if part)


def add_transform(value: ir.Value, transform: Transform) -> None:
    """Record one more transform of the initializer."""
    value.metadata_props[TRANSFORMS] = ",".join((*transforms_of(value), transform))
