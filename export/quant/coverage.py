"""What share of a quantized graph's work and bytes is in 8 bits, and which layers stayed in high precision and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ditc.export.quant.plan import QuantPlan
from ditc.runtime.plugins.linear_attention import NAMES as LINEAR_ATTENTION
from ditc.runtime.spec import StageSpec

EIGHT_BITS = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLayer:
    """A layer that stayed in the base precision, its share of the FLOPs of GEMMs with weights, and the reason."""

    name: str
    share: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of a graph is in 8 bits. FLOPs are those of one run at the profile's usual sizes.

    Attributes:
        layers: number of layers in 8 bits.
        gemm_share: share in 8 bits of the FLOPs of all GEMMs with weights (Linears, 1x1 convolutions; in a VAE, all
            convolutions).
        product_share: share in 8 bits of the FLOPs of all matrix products and convolutions, attention's included.
        weight_share: share of the weights, by their number, that is stored in 8 bits.
        size_bytes, fp16_bytes: size of all weights as stored, and if all were fp16.
        high: the layers that stayed in high precision, largest share first.
    """

    layers: int
    gemm_share: float
    product_share: float
    weight_share: float
    size_bytes: int
    fp16_bytes: int
    high: tuple[KeptLayer, ...]


def measure_coverage(model: ir.Model, plan: QuantPlan, spec: StageSpec) -> Coverage:
    """Measure the coverage of a quantized graph from its nodes."""
    sizes = _sizes(model, spec)
    products = list(_products(model, sizes))
    # The depthwise convolutions and patch embeddings of a denoiser are no GEMMs, and no plan names them.
    named = [*plan.layers, *plan.kept_high_precision]
    gemms = [
        p
        for p in products
        if p.weight is not None and (not p.convolution or any(_is(p.weight, name) for name in named))
    ]
    total = sum(p.flops for p in gemms) or 1
    kept = []
    for name, why in plan.kept_high_precision.items():
        flops = sum(p.flops for p in gemms if p.weight is not None and _is(p.weight, name))
        kept.append(KeptLayer(name=name, share=flops / total, why=why))
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    eight = sum(t.size for t in tensors if t.dtype in EIGHT_BITS)
    weights = sum(t.size for t in tensors)
    return Coverage(
        layers=len(plan.layers),
        gemm_share=sum(p.flops for p in gemms if p.eight_bits) / total,
        product_share=sum(p.flops for p in products if p.eight_bits) / (sum(p.flops for p in products) or 1),
        weight_share=eight / (weights or 1),
        size_bytes=sum(t.nbytes for t in tensors),
        fp16_bytes=2 * weights,
        high=tuple(sorted(kept, key=lambda layer: -layer.share)),
    )


@dataclass(frozen=True, slots=True)
class _Product:
    flops: int
    weight: str | None
    eight_bits: bool
    convolution: bool = False


def _products(model: ir.Model, sizes: Mapping[str, int]) -> Iterator[_Product]:
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            weight = node.inputs[1]
            name, quantized = _weight_of(weight)
            inner = _dims(node.inputs[0], sizes)[-1]
            yield _Product(2 * math.prod(_dims(node.outputs[0], sizes)) * inner, name, quantized)
        elif node.op_type == "Conv":
            kernel = math.prod(_dims(node.inputs[1], sizes)[1:])
            flops = 2 * math.prod(_dims(node.outputs[0], sizes)) * kernel
            yield _Product(flops, *_weight_of(node.inputs[1]), convolution=True)
        elif node.op_type in LINEAR_ATTENTION:
            rows, tokens, heads, width = _dims(node.inputs[0], sizes)
            yield _Product(4 * rows * tokens * heads * width * (width + 1), None, False)  # KV, then KV x Q


def _sizes(model: ir.Model, spec: StageSpec) -> dict[str, int]:
    """The optimum size of every named dimension, and the sizes that follow for the symbols that torch.export made.

    With patches, for example, "height" is 2*height_by_2 in the inputs and 2*s25 after the patch embedding. A Reshape
    keeps the number of elements, so if its result has one new symbol, the size of that symbol can be solved for.
    """
    sizes = {name: bounds.opt for name, bounds in spec.profile.items()}
    sizes |= {f"{name}_by_{r.multiple_of}": r.opt // r.multiple_of for name, r in spec.profile.items()}
    for node in model.graph:
        if node.op_type != "Reshape" or node.inputs[0] is None:
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if before is None or after is None:
            continue
        new = {name for d in after.dims if not isinstance(d, int) for name in d.free_symbols() - sizes.keys()}
        if len(new) == 1:
            (name,) = new
            count, unit = _count(before, sizes), _count(after, {**sizes, name: 1})
            if count and unit:
                sizes[name] = count // unit
    return sizes


def _count(shape: ir.Shape, sizes: Mapping[str, int]) -> int | None:
    """Number of elements of a tensor; None if the size of a dimension is not known."""
    known = shape.evaluate(sizes)
    return math.prod(known.numpy()) if known.is_static() else None


def _weight_of(value: ir.Value | None) -> tuple[str | None, bool]:
    """The name of the initializer behind a GEMM's second input, and whether it is stored in 8 bits."""
    maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "DequantizeLinear":
        stored = maker.inputs[0]
        return (None if stored is None else stored.name), True
    return (value.name if value is not None and value.is_initializer() else None), False


def _dims(value: ir.Value | None, sizes: Mapping[str, int]) -> Sequence[int]:
    assert value is not None and value.shape is not None
    return value.shape.evaluate(sizes).numpy()


def _is(parameter: str, layer: str) -> bool:
    return parameter == f"{layer}.weight" or parameter.endswith(f".{layer}.weight")
