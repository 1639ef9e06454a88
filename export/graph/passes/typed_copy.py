"""A copy of a graph in which every value has a type: functions are inlined, and types inferred through their bodies."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

# Metadata of a node that comes from the body of a function: the name of that function.
FUNCTION = "ditc.function"


def typed_copy(model: ir.Model) -> ir.Model:
    """Copy the model with functions inlined, constants lifted and element types inferred. Both share their tensors."""
    copy = model.clone()
    for function in copy.functions.values():
        for node in function:
            node.metadata_props[FUNCTION] = function.name
    common.InlinePass()(copy)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(copy)
    return copy
