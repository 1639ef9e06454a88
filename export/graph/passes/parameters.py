"""Which initializers are the network's own weights, and how each is stored: the rest of ditc speaks these names.

torch.export names every parameter and buffer by its module path. LoRA, refit, Q/DQ placement and parity find weights
by that name, so no pass may rename, merge, fold or drop one because of the values that it happens to hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir

from ditc.runtime.weight_map import Transform

# Metadata of the initializer's value, written to the file: names of transforms, first applied first.
TRANSFORMS = "ditc.transforms"


@contextmanager
def hidden_values(initializers: Mapping[str, ir.Value]) -> Iterator[None]:
    """Inside, the initializers have names, shapes and types but no values: an optimizer cannot act on them."""
    tensors = [(value, value.const_value) for value in initializers.values()]
    for value, _ in tensors:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in tensors:
            value.const_value = tensor


def transforms_of(value: ir.Value) -> tuple[Transform, ...]:
    """What was done to the parameter's values when they became this initializer."""
    return tuple(Transform(part) for part in value.metadata_props.get(TRANSFORMS, "").split(",") if part)


def add_transform(value: ir.Value, transform: Transform) -> None:
    """Record one more transform of the initializer."""
    value.metadata_props[TRANSFORMS] = ",".join((*transforms_of(value), transform))
