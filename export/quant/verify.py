"""Hold a written graph's scales and codes against its plan: what parity cannot tell from a coarse recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from ditc.export.quant.formats import LARGEST_CODE, Format
from ditc.export.quant.plan import LayerPlan, QuantPlan
from ditc.runtime.errors import BuildError
from ditc.runtime.session import Array

# fp16 scales carry 11 bits; fp32 ones are exact. A scale that is wrong is wrong by far more.
ROUNDING = 2**-10


def check_scales(graph: Path, plan: QuantPlan) -> None:
    """Raise BuildError unless every planned layer of the file has the plan's scale, zero point 0 and full codes."""
    model = ir.load(graph)
    gemms = {}
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            weight = node.inputs[1]
            maker = weight.producer() if weight is not None else None
            if maker is not None and maker.op_type == "DequantizeLinear":
                gemms[maker.inputs[0].name.removesuffix(".weight")] = (node, maker)
    for name, layer in plan.layers.items():
        found = [pair for module, pair in gemms.items() if module == name or module.endswith("." + name)]
        if len(found) != 1:
            raise BuildError(f"{name}: {len(found)} quantized GEMMs of that name in {graph.name}, expected 1")
        gemm, weight = found[0]
        _check_weight(name, weight, layer.kind)
        _check_input(name, gemm, layer)


def _check_weight(name: str, dequantize: ir.Node, kind: Format) -> None:
    codes, scale, zero = (_constant(dequantize, i) for i in range(3))
    axis = dequantize.attributes.get_int("axis", 1)
    others = tuple(i for i in range(codes.ndim) if i != axis)
    largest = np.abs(codes.astype(np.float32)).max(axis=others)
    used = largest > 0
    if np.any(zero.astype(np.float32) != 0) or not np.isfinite(scale.astype(np.float32)).all():
        raise BuildError(f"{name}: the weight's zero points or scales are not what the format asks for")
    # A channel whose scale was raised to the smallest normal number uses fewer codes; that is no channel of a
    # working network, so a graph in which most channels do is a wrong scale.
    if used.any() and np.median(largest[used]) < LARGEST_CODE[kind] * (1 - 2**-4):
        raise BuildError(
            f"{name}: weight codes reach {np.median(largest[used]):.0f} of {LARGEST_CODE[kind]:.0f}"
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
