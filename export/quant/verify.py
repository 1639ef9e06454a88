"""Hold a written graph's scales and codes against its plan: what parity cannot tell from a coarse recipe."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ditc.export.quant.formats import LARGEST_CODE, Format
from ditc.export.quant.layers import Layer
from ditc.export.quant.plan import LayerPlan
from ditc.runtime.errors import BuildError
from ditc.runtime.session import Array

# fp16 scales carry 11 bits; fp32 ones are exact. A scale that is wrong is wrong by far more.
ROUNDING = 2**-10


# The largest error of a rounding as a share of a channel's amax: half a step of 127, half an ulp of E4M3's 3 bits;
# a fifth more for scales that were themselves rounded to 16 bits.
LARGEST_ERROR = {Format.INT8: 1.2 * 0.5 / 127, Format.FP8: 1.2 * 2**-4}


def check_scales(model: ir.Model, plans: Mapping[str, LayerPlan], layers: Mapping[str, Layer]) -> None:
    """Hold every planned layer of a graph against its plan and its weights.

    Raises:
        BuildError: an input's scale is not the plan's, or codes times scale are not the weight; names the layer.
    """
    readers = _readers(model)
    for name, planned in plans.items():
        found = readers.get(layers[name].parameter)
        if found is None:
            raise BuildError(f"{name}: the graph has no quantized GEMM with {layers[name].parameter}")
        gemm, weight = found
        _check_weight(weight, planned, layers[name])
        _check_input(name, gemm, planned)


def _readers(model: ir.Model) -> dict[str, tuple[ir.Node, ir.Node]]:
    """Parameter -> the GEMM that reads it and the DequantizeLinear in between."""
    readers = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        maker = weight.producer() if weight is not None else None
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.inputs[0] is not None:
            readers[str(maker.inputs[0].name)] = node, maker
    return readers


def _check_weight(dequantize: ir.Node, planned: LayerPlan, layer: Layer) -> None:
    codes, scale, zero = (_constant(dequantize, i).astype(np.float32) for i in range(3))
    axis = dequantize.attributes.get_int("axis", 1)
    wanted_OI = layer.weight()
    if planned.input is not None and planned.input.smooth is not None:
        wanted_OI = wanted_OI * planned.input.smooth
    stored_OI = (codes if axis == 0 else codes.T) * scale[:, None]
    error = np.abs(stored_OI - wanted_OI).max(axis=1)
    bound = np.abs(wanted_OI).max(axis=1) * LARGEST_ERROR[planned.kind]
    bad = np.flatnonzero(~(error <= bound))
    if bad.size or np.any(zero != 0):
        raise BuildError(
            f"{planned.name}: the stored weight is not the checkpoint's in {bad.size} of {len(error)} output channels"
            + (
                f": channel {bad[0]} is {error[bad[0]]:.3g} off, at most {bound[bad[0]]:.3g}"
                if bad.size
                else ""
            ),
            hint="build again; a graph that was changed by hand is not what was calibrated",
        )


def _check_input(name: str, gemm: ir.Node, layer: LayerPlan) -> None:
    maker = gemm.inputs[0].producer() if gemm.inputs[0] is not None else None
    quantized = maker is not None and maker.op_type == "DequantizeLinear"
    if quantized != (layer.input is not None):
        raise BuildError(f"{name}: its input is {'' if quantized else 'not '}quantized, against the plan")
    if layer.input is None or maker is None:
        return
    scale, wanted = float(_constant(maker, 1)), layer.input.amax / LARGEST_CODE[layer.kind]
    if abs(scale / wanted - 1) > ROUNDING and scale > np.finfo(np.float16).smallest_normal:
        raise BuildError(
            f"{name}: the input's scale in the graph is {scale:.6g}, calibration gives {wanted:.6g}",
            hint="build again; a graph that was changed by hand is not what was calibrated",
        )


def _constant(node: ir.Node, index: int) -> Array:
    value = node.inputs[index]
    tensor = None if value is None else value.const_value
    if tensor is None:
        raise BuildError(f"{node.name}: input {index} is no constant of the graph")
    array: Array = tensor.numpy()
    return array
