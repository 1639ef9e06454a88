"""Coverage finds the sizes of the symbols that torch.export makes inside a graph with patches."""

from __future__ import annotations

import onnx_ir as ir

from ditc.export.quant.coverage import _sizes
from ditc.runtime.spec import DType, Range, StageSpec, TensorSpec


def test_a_reshape_into_patches_gives_its_new_symbols_their_sizes() -> None:
    def value(name: str, *dims: int | str) -> ir.Value:
        shape = ir.Shape([d if isinstance(d, int) else ir.SymbolicDim(d) for d in dims])
        return ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))

    latents = value("latents", "rows", 8, "2*height_by_2", "2*width_by_2")
    columns = value("columns", "rows", 8, "2*height_by_2", "s52", 2)
    patches = value("patches", "rows", 8, "s25", 2, "s52", 2)
    target = ir.Value(name="target")
    nodes = [
        ir.Node("", "Reshape", [latents, target], outputs=[columns]),
        ir.Node("", "Reshape", [columns, target], outputs=[patches]),
    ]
    model = ir.Model(ir.Graph([latents, target], [patches], nodes=nodes), ir_version=10)
    profile = {"rows": Range(1, 2, 4), "height": Range(4, 32, 64, 2), "width": Range(4, 48, 64, 2)}
    spec = StageSpec(
        "x", (TensorSpec("latents", DType.FLOAT32, ("rows", 8, "height", "width")),), (), profile
    )
    sizes = _sizes(model, spec)
    assert (sizes["s25"], sizes["s52"]) == (16, 24)
