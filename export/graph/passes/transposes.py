"""Store a Linear's weight as its MatMul reads it: Transpose(parameter) becomes the transposed parameter.

Backends would fold the Transpose themselves, but quantization and refit need the weight as the GEMM's direct input.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from ditc.export.graph.passes.parameters import add_transform
from ditc.runtime.weight_map import Transform


def fold_transposes(model: ir.Model) -> None:
    """Fold the Transposes of every matrix that only Transposes read, in place. Values are viewed, not copied."""
    for parameter in list(model.graph.initializers.values()):
        readers = [use.node for use in parameter.uses()]
        if readers and all(_swaps_matrix(node, parameter) for node in readers):
            _store_transposed(parameter)
            for node in readers:
                node.outputs[0].replace_all_uses_with(parameter)
                model.graph.remove(node, safe=True)


def _swaps_matrix(node: ir.Node, value: ir.Value) -> bool:
    if node.op_type != "Transpose" or node.domain or value.shape is None or node.outputs[0].is_graph_output():
        return False
    order = node.attributes.get("perm")
    return len(value.shape) == 2 and (order is None or list(order.as_ints()) == [1, 0])


def _store_transposed(parameter: ir.Value) -> None:
    tensor = parameter.const_value
    assert tensor is not None, f"{parameter.name} has no values"
    parameter.const_value = _transposed(tensor)
    parameter.shape = ir.Shape(reversed(tensor.shape.numpy()))
    add_transform(parameter, Transform.TRANSPOSE)


def _transposed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A view of the parameter's own memory. Its rows are put in order when the file is written, tensor by tensor.

    PyTorch does that block by block. NumPy writes a transposed array element by element, which is ten times slower.
    """
    if isinstance(tensor.raw, torch.Tensor):
        return TorchTensor(tensor.raw.detach().T, tensor.name)
    return ir.Tensor(tensor.numpy().T, dtype=tensor.dtype, name=tensor.name)
