"""Check a written graph's scales and weights against its plan: parity may mistake a wrong scale for a coarse recipe."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ditc.export.quant.formats import QUANTIZED_MAX, Format
from ditc.export.quant.layers import Layer
from ditc.export.quant.plan import LayerPlan
from ditc.runtime.errors import BuildError
from ditc.runtime.session import Array

# How much a right scale may differ: an fp16 scale has 11 bits, a bf16 scale has 8, and an fp32 scale is exact. A wrong
# scale is off by far more.
ROUNDING, BF16_ROUNDING = 2**-10, 2**-7
# The largest rounding error, as a share of a channel's amax: half of one of 127 steps, or half an ulp of E4M3's 3 bits.
# A fifth is added for scales that were themselves rounded to 16 bits.
LARGEST_ERROR = {Format.INT8: 1.2 * 0.5 / 127, Format.FP8: 1.2 * 2**-4}


def check_scales(model: ir.Model, plans: Mapping[str, LayerPlan], layers: Mapping[str, Layer]) -> None:
    """Compare every planned layer of a graph with its plan and its weights.

    Raises:
        BuildError: an input's scale is not the plan's, or the dequantized weight is not the checkpoint's. The
            message names the layer.
    """
    readers = _readers(model)
    for name, planned in plans.items():
        found = readers.get(layers[name].parameter)
        if found is None:
            raise BuildError(
                f"{name}: the graph has no quantized GEMM with the weight {layers[name].parameter}",
                hint="build again, and do not change the graph by hand",
            )
        gemm, weight = found
        _check_weight(weight, planned, layers[name])
        _check_input(name, gemm, planned)


def _readers(model: ir.Model) -> dict[str, tuple[ir.Node, ir.Node]]:
    """Parameter -> the GEMM that reads it, and the DequantizeLinear in between."""
    readers = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm", "Conv") else None
        maker = weight.producer() if weight is not None else None
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.inputs[0] is not None:
            readers[str(maker.inputs[0].name)] = node, maker
    return readers


def _check_weight(dequantize: ir.Node, planned: LayerPlan, layer: Layer) -> None:
    quantized, scale, zero = (_constant(dequantize, i).astype(np.float32) for i in range(3))
    axis = dequantize.attributes.get_int("axis", 1)
    wanted_OI = layer.weight().reshape(len(layer.weight()), -1)
    if planned.input is not None and planned.input.smooth is not None:
        wanted_OI = wanted_OI * planned.input.smooth
    stored_OI = (quantized.reshape(len(quantized), -1) if axis == 0 else quantized.T) * scale[:, None]
    error = np.abs(stored_OI - wanted_OI).max(axis=1)
    bound = np.abs(wanted_OI).max(axis=1) * LARGEST_ERROR[planned.kind]
    bad = np.flatnonzero(~(error <= bound))
    if bad.size or np.any(zero != 0):
        raise BuildError(
            f"{planned.name}: the stored weight is not the checkpoint's in {bad.size} of {len(error)} output channels"
            + (
                f": channel {bad[0]} is off by {error[bad[0]]:.3g}, and {bound[bad[0]]:.3g} is allowed"
                if bad.size
                else "; a zero point is not 0"
            ),
            hint="build again, and do not change the graph by hand",
        )


def _check_input(name: str, gemm: ir.Node, layer: LayerPlan) -> None:
    maker = gemm.inputs[0].producer() if gemm.inputs[0] is not None else None
    quantized = maker is not None and maker.op_type == "DequantizeLinear"
    if quantized != (layer.input is not None):
        raise BuildError(
            f"{name}: the graph {'quantizes' if quantized else 'does not quantize'} its input, against the plan",
            hint="build again, and do not change the graph by hand",
        )
    if layer.input is None or maker is None:
        return
    if layer.input.per_token and not _has_token_scales(gemm, maker):
        raise BuildError(
            f"{name}: its tokens have no scales of their own in the graph, against the plan",
            hint="build again, and do not change the graph by hand",
        )
    found, wanted = _constant(maker, 1), layer.input.amax / QUANTIZED_MAX[layer.kind]
    scale = float(found)
    rounding = BF16_ROUNDING if ir.DataType.from_numpy(found.dtype) is ir.DataType.BFLOAT16 else ROUNDING
    if abs(scale / wanted - 1) > rounding and scale > np.finfo(np.float16).smallest_normal:
        raise BuildError(
            f"{name}: the input's scale is {scale:.6g} in the graph, but {wanted:.6g} in the plan",
            hint="build again, and do not change the graph by hand",
        )


def _has_token_scales(gemm: ir.Node, dequantize: ir.Node) -> bool:
    """Whether the GEMM's input is divided by a column of magnitudes, and its result multiplied by the same column."""
    quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
    divide = (
        quantize.inputs[0].producer() if quantize is not None and quantize.inputs[0] is not None else None
    )
    if divide is None or divide.op_type != "Div":
        return False
    readers = [use.node for use in gemm.outputs[0].uses()]
    return bool(readers) and all(n.op_type == "Mul" and divide.inputs[1] in n.inputs for n in readers)


def _constant(node: ir.Node, index: int) -> Array:
    value = node.inputs[index]
    tensor = None if value is None else value.const_value
    if tensor is None:
        raise BuildError(f"{node.name}: input {index} is not a constant of the graph", hint="build again")
    array: Array = tensor.numpy()
    return array
