"""Write x[index] over rows as one Gather: torch's exporter writes Unsqueeze and GatherND (torch 2.13)."""

from __future__ import annotations

import onnx_ir as ir


def gather_rows(model: ir.Model) -> None:
    """Replace GatherND(data, Unsqueeze(index, last axis)) by Gather(data, index, axis=0), in place."""
    for node in list(model.graph):
        index = _row_index(node)
        if index is None:
            continue
        gather = ir.node("Gather", [node.inputs[0], index], {"axis": 0}, name=node.name)
        gather.metadata_props.update(node.metadata_props)
        output = node.outputs[0]
        gather.outputs[0].shape, gather.outputs[0].type = output.shape, output.type
        unsqueeze = node.inputs[1].producer() if node.inputs[1] else None
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [gather], [output], [gather.outputs[0]]
        )
        if unsqueeze is not None and not unsqueeze.outputs[0].uses():
            model.graph.remove(unsqueeze, safe=True)


def _row_index(node: ir.Node) -> ir.Value | None:
    """The index of a GatherND that picks whole rows; None for any other node."""
    if node.op_type != "GatherND" or node.domain or node.attributes.get_int("batch_dims", 0) != 0:
        return None
    indices = node.inputs[1]
    producer = indices.producer() if indices is not None else None
    if producer is None or producer.op_type != "Unsqueeze":
        return None
    index, axis = producer.inputs
    axes = None if axis is None else ir.convenience.get_const_tensor(axis)
    if index is None or index.shape is None or axes is None:
        return None
    return index if axes.numpy().tolist() in ([-1], [len(index.shape)]) else None
