"""Check a graph's inputs and outputs against the spec: exporters may drop unused inputs or freeze dynamic axes."""

from __future__ import annotations

import onnx_ir as ir

from ditc.runtime.errors import BuildError
from ditc.runtime.spec import DType, StageSpec

ELEMENT_TYPES = {
    DType.FLOAT32: ir.DataType.FLOAT,
    DType.FLOAT16: ir.DataType.FLOAT16,
    DType.BFLOAT16: ir.DataType.BFLOAT16,
    DType.INT64: ir.DataType.INT64,
    DType.BOOL: ir.DataType.BOOL,
}


def check_interface(model: ir.Model, spec: StageSpec) -> None:
    """Compare the graph's inputs and outputs with the spec.

    Raises:
        BuildError: a name is missing or extra, an element type differs, or an axis that must be dynamic is fixed.
    """
    found = {value.name: value for value in model.graph.inputs}
    wanted = {tensor.name: tensor for tensor in spec.inputs}
    if found.keys() != wanted.keys():
        raise BuildError(
            f"{spec.name}: the exported graph takes {sorted(map(str, found))}, but the spec has {sorted(wanted)}",
            hint="an input that the network does not use disappears on export: remove it from the spec",
        )
    outputs = [value.name for value in model.graph.outputs]
    promised = [tensor.name for tensor in spec.outputs]
    if outputs != promised:
        raise BuildError(
            f"{spec.name}: the exported graph gives {outputs}, but the spec has {promised}",
            hint="name the outputs in the spec as the network returns them",
        )
    for value, tensor in [(found[tensor.name], tensor) for tensor in spec.inputs] + list(
        zip(model.graph.outputs, spec.outputs, strict=True)
    ):
        if value.dtype != ELEMENT_TYPES[tensor.dtype]:
            raise BuildError(
                f"{spec.name}: {tensor.name} is {value.dtype.name.lower() if value.dtype else 'of unknown type'} in "
                f"the exported graph, but {tensor.dtype.value} in the spec",
                hint="cast it in the network, or change the spec",
            )
    for name, tensor in wanted.items():
        shape = found[name].shape
        for axis, size in enumerate(tensor.shape):
            if isinstance(size, str) and shape is not None and isinstance(shape[axis], int):
                raise BuildError(
                    f"{spec.name}: axis {axis} of {name} ({size}) was frozen to {shape[axis]} by the export",
                    hint="the network reads that size as a number: compute with symbolic sizes instead",
                )
