"""Write a quantization plan into a graph: QuantizeLinear and DequantizeLinear before the planned GEMMs and Convs.

    x -> [Mul 1/smooth] -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- W (8 bits)

The ops are standard since opset 19 and the quantization is symmetric, which is the only form that ONNX Runtime,
TensorRT-RTX and TensorRT all take. Weights are stored in 8 bits, with one scale per output channel. Activations have
one scale per tensor, and layers that read the same tensor share its scale. Outputs of GEMMs are not quantized: a
DequantizeLinear after a GEMM costs more on a CPU than the GEMM saved, and both libraries fuse the nodes that follow
better if they start from a tensor in high precision.

With per-token scales the same nodes stand between a division and a multiplication, so that every library runs them:

    amax = ReduceMax(Abs(x))     x / amax -> QuantizeLinear -> DequantizeLinear -> MatMul -> Mul amax
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ditc.export.graph.passes.parameters import add_transform
from ditc.export.graph.passes.scopes import NAME_SCOPES
from ditc.export.quant.formats import STORAGE_DTYPE, Format, quantize, scale_of, weight_amax
from ditc.export.quant.plan import Input, LayerPlan, QuantPlan
from ditc.runtime.errors import BuildError
from ditc.runtime.session import Array
from ditc.runtime.weight_map import Codes, Transform

SCALE = "_scale"
PRODUCTS = ("MatMul", "Gemm", "Conv")
# Metadata of a smoothed weight: the name of the initializer that holds the reciprocals of its smoothing factors.
SMOOTHING = "ditc.smoothing"
# ONNX Runtime 1.31 makes integer kernels of int8 pairs on x86 only if the quantized tensor has one reader. So every
# GEMM has a Q/DQ pair of its own, which ONNX Runtime must not merge with an equal one. The pairs differ in `axis`,
# which has no meaning with a scalar scale (ONNX, QuantizeLinear), but makes them different subexpressions.
UNSHARED_AXES = (0, 1, 2)


def quantize_graph(model: ir.Model, plan: QuantPlan, parameters: Mapping[str, str]) -> None:
    """Quantize the planned layers in place.

    Args:
        parameters: layer -> name of the initializer that holds its weight.

    Raises:
        BuildError: a layer's weight is not the direct second input of exactly one MatMul, Gemm or Conv.
    """
    writer = _Writer(model.graph)
    readers = {name: _gemm(model, name, parameters[name]) for name in plan.layers}
    order = {node: index for index, node in enumerate(model.graph)}
    for name in sorted(readers, key=lambda n: order[readers[n]]):
        layer = plan.layers[name]
        if layer.input is not None:
            together = [readers[n] for n in readers if plan.layers[n].input is layer.input]
            writer.quantize_input(readers[name], layer, together)
        writer.quantize_weight(readers[name], layer, parameters[name])


def codes_of(value: ir.Value) -> Codes | None:
    """How to read a weight that is stored in 8 bits; None for a weight that is not."""
    reader = next((use.node for use in value.uses() if use.node.op_type == "DequantizeLinear"), None)
    if reader is None:
        return None
    return Codes(
        axis=reader.attributes.get_int("axis", 1),
        scale=f"{value.name}{SCALE}",
        reciprocals=value.metadata_props.get(SMOOTHING),
    )


def _gemm(model: ir.Model, layer: str, parameter: str) -> ir.Node:
    """The one node that multiplies by the layer's weight."""
    value = model.graph.initializers.get(parameter)
    uses = [] if value is None else list(value.uses())
    if len(uses) != 1 or uses[0].idx != 1 or uses[0].node.op_type not in PRODUCTS:
        found = ", ".join(use.node.op_type for use in uses) or "nothing"
        raise BuildError(
            f"{layer}: the weight {parameter} must be the second input of one MatMul, Gemm or Conv, but is read by "
            f"{found}",
            hint="run the graph passes first; a layer that is used twice cannot be quantized",
        )
    return uses[0].node


class _Writer:
    """Adds nodes and initializers to one graph, and remembers which tensors have their scale already."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._sources: dict[tuple[int, int], list[tuple[ir.Value, ir.Value, ir.Value]]] = {}
        self._zeros: dict[Format, ir.Value] = {}
        self._smoothing: dict[int, str] = {}
        self._amax: dict[tuple[int, int], ir.Value] = {}

    def quantize_input(self, gemm: ir.Node, layer: LayerPlan, together: Sequence[ir.Node]) -> None:
        """Feed the GEMM from a Q/DQ pair, whose scale is shared by all layers that read the same tensor.

        Args:
            together: the GEMMs of all layers that have the same planned input.
        """
        x, planned = gemm.inputs[0], layer.input
        assert x is not None and planned is not None
        key = id(x), id(planned)
        readers = self._sources.setdefault(key, [])
        if not readers:
            site = f"{_module(gemm)}.input"
            source = x
            if planned.per_token:
                source, self._amax[key] = self._divided_by_amax(x, site, gemm)
            elif planned.smooth is not None:
                source = self._smoothed(x, planned, site, gemm, together)
            scale = self._constant(site + SCALE, scale_of(planned.amax, layer.kind, _numpy(x)))
            readers.append((source, scale, self._zero(layer.kind)))
        else:
            readers.append(readers[0])
        source, scale, zero = readers[0]
        name, axis = f"{_module(gemm)}.input", {"axis": UNSHARED_AXES[len(readers) % len(UNSHARED_AXES)]}
        down = self._node("QuantizeLinear", [source, scale, zero], f"{name}.quantize", gemm, axis, x.shape)
        down.type = ir.TensorType(_storage_type(layer.kind))
        up = self._node("DequantizeLinear", [down, scale, zero], f"{name}.dequantize", gemm, axis, x.shape)
        up.type = x.type
        gemm.replace_input_with(0, up)
        if planned.per_token:
            self._multiply_result(gemm, self._amax[key])

    def quantize_weight(self, gemm: ir.Node, layer: LayerPlan, parameter: str) -> None:
        """Store the quantized weight under its own name, and dequantize it where the GEMM reads it."""
        value = gemm.inputs[1]
        assert value is not None and value.const_value is not None
        rows_first = gemm.op_type == "Conv" or gemm.attributes.get_int("transB", 0) == 1
        axis = 0 if rows_first else 1
        dtype = value.const_value.dtype
        weight: Array = value.const_value.numpy().astype(np.float32)
        if layer.input is not None and layer.input.smooth is not None:
            weight = weight * np.expand_dims(layer.input.smooth, axis)
            add_transform(value, Transform.SMOOTH)
            value.metadata_props[SMOOTHING] = self._smoothing[id(layer.input)]
        scale = scale_of(weight_amax(weight, axis, layer.kind), layer.kind, dtype.numpy())
        storage = _storage_type(layer.kind)
        stored = ir.Tensor(quantize(weight, scale, layer.kind), dtype=storage, name=parameter)
        add_transform(value, Transform.QUANTIZE)
        value.const_value, value.dtype = stored, stored.dtype
        scales = self._constant(parameter + SCALE, scale.reshape(-1))
        zeros = self._constant(f"{parameter}_zero_point", np.zeros(scale.size, STORAGE_DTYPE[layer.kind]))
        up = self._node(
            "DequantizeLinear",
            [value, scales, zeros],
            f"{parameter}.dequantize",
            gemm,
            {"axis": axis},
            value.shape,
        )
        up.dtype = dtype
        gemm.replace_input_with(1, up)

    def _smoothed(
        self, x: ir.Value, planned: Input, site: str, gemm: ir.Node, together: Sequence[ir.Node]
    ) -> ir.Value:
        """x / smooth. If x is the result of an adaptive norm, the norm's scale and shift are divided instead.

        They have one row per sample, while x has one row per token.
        """
        assert planned.smooth is not None
        inverse = self._constant(f"{site}_smoothing", (1 / planned.smooth).astype(_numpy(x)))
        self._smoothing[id(planned)] = str(inverse.name)
        modulation = _modulation(x, together)
        if modulation is None:
            return self._scaled(x, inverse, f"{site}.smooth", gemm)
        add, product, shift_at, scale_at = modulation
        for node, index in ((product, scale_at), (add, shift_at)):
            row = node.inputs[index]
            assert row is not None
            node.replace_input_with(
                index, self._scaled(row, inverse, f"{site}.smooth_{node.op_type}", product)
            )
        return x

    def _divided_by_amax(self, x: ir.Value, site: str, gemm: ir.Node) -> tuple[ir.Value, ir.Value]:
        """x divided by each token's largest magnitude, and these magnitudes (..., 1). Tokens of zeros stay zeros."""
        assert x.shape is not None
        column = ir.Shape([*x.shape[:-1], 1])
        magnitude = self._node("Abs", [x], f"{site}.abs", gemm, shape=x.shape)
        magnitude.type = x.type
        last = self._constant(f"{site}_axes", np.array([-1], np.int64))
        amax = self._node("ReduceMax", [magnitude, last], f"{site}.amax", gemm, {"keepdims": 1}, column)
        amax.type = x.type
        smallest = ml_dtypes.finfo(_numpy(x)).smallest_normal  # type: ignore[no-untyped-call]
        tiny = self._constant(f"{site}_tiny", np.array(smallest, _numpy(x)))
        divisor = self._node("Max", [amax, tiny], f"{site}.divisor", gemm, shape=column)
        divisor.type = x.type
        divided = self._node("Div", [x, divisor], f"{site}.divide", gemm, shape=x.shape)
        divided.type = x.type
        return divided, divisor

    def _multiply_result(self, gemm: ir.Node, amax: ir.Value) -> None:
        """Multiply the GEMM's result by the magnitudes that its input was divided by."""
        if len(gemm.inputs) > 2:
            raise BuildError(
                f"{_module(gemm)}: a per-token scale needs a product without a bias, but this Gemm adds one",
                hint="leave per_token out of the recipe's rule for this layer",
            )
        result = gemm.outputs[0]
        readers = list(result.uses())
        product = self._scaled(result, amax, f"{_module(gemm)}.output.multiply", gemm, after=True)
        for node, index in readers:
            node.replace_input_with(index, product)

    def _scaled(
        self, x: ir.Value, factor: ir.Value, name: str, beside: ir.Node, *, after: bool = False
    ) -> ir.Value:
        out = self._node("Mul", [x, factor], name, beside, shape=x.shape, after=after)
        out.type = x.type
        return out

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        beside: ir.Node,
        attributes: Mapping[str, int] | None = None,
        shape: ir.Shape | None = None,
        *,
        after: bool = False,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, dict(attributes or {}), name=name)
        if NAME_SCOPES in beside.metadata_props:
            node.metadata_props[NAME_SCOPES] = beside.metadata_props[NAME_SCOPES]
        (self._graph.insert_after if after else self._graph.insert_before)(beside, node)
        node.outputs[0].name = name
        node.outputs[0].shape = shape
        return node.outputs[0]

    def _zero(self, kind: Format) -> ir.Value:
        if kind not in self._zeros:
            self._zeros[kind] = self._constant(f"zero_point_{kind.value}", np.zeros((), STORAGE_DTYPE[kind]))
        return self._zeros[kind]

    def _constant(self, name: str, values: Array) -> ir.Value:
        tensor = ir.Tensor(values, dtype=ir.DataType.from_numpy(values.dtype), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value


def _modulation(x: ir.Value, together: Sequence[ir.Node]) -> tuple[ir.Node, ir.Node, int, int] | None:
    """Recognise x as norm * scale + shift, with one scale and shift per row of the batch.

    Only these GEMMs may read x, because x itself is changed.

    Returns:
        The Add, the Mul, and the positions of shift and scale among their inputs; None if x is something else.
    """
    add = x.producer()
    if add is None or add.op_type != "Add" or {use.node for use in x.uses()} - set(together):
        return None
    for shift_at in (0, 1):
        shift, scaled = add.inputs[shift_at], add.inputs[1 - shift_at]
        product = scaled.producer() if scaled is not None else None
        if (
            scaled is None
            or product is None
            or product.op_type != "Mul"
            or not _one_row(shift)
            or len(list(scaled.uses())) != 1
        ):
            continue
        for scale_at in (0, 1):
            if _one_row(product.inputs[scale_at]) and not _one_row(product.inputs[1 - scale_at]):
                return add, product, shift_at, scale_at
    return None


def _one_row(value: ir.Value | None) -> bool:
    """Whether the value is a (R,1,C) tensor, which is broadcast over the tokens."""
    shape = None if value is None else value.shape
    return shape is not None and len(shape) == 3 and shape[1] == 1


def _module(gemm: ir.Node) -> str:
    weight = gemm.inputs[1]
    assert weight is not None and weight.name is not None
    return weight.name.removesuffix(".weight")


def _numpy(value: ir.Value) -> np.dtype[np.generic]:
    assert value.dtype is not None
    return value.dtype.numpy()


def _storage_type(kind: Format) -> ir.DataType:
    return ir.DataType.INT8 if kind is Format.INT8 else ir.DataType.FLOAT8E4M3FN
