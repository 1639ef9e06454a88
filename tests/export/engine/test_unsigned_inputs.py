"""The 8-bit inputs of GEMMs become unsigned in OpenVINO's files, and every value stays the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from ditc.export.engine.graph_files import inlined
from ditc.export.engine.unsigned_inputs import ZERO_POINT, make_inputs_unsigned

GRAPH = """
<ir_version: 10, opset_import: ["": 21]>
agraph (float[3, 4] x) => (float[3, 2] y, float[3, 2] z, float[3, 4] other)
<float scale = {0.5}, int8 zero = {0}, int8 one = {1},
 int8[4, 2] weight = {1, -2, 3, 127, -128, 5, 6, -7}, float[2] scales = {0.25, 2.0}, int8[2] zeros = {0, 0},
 int8[3, 4] small_q, float[3, 4] small>
{
    w = DequantizeLinear <axis = 1> (weight, scales, zeros)
    small_q = QuantizeLinear (x, scale, zero)
    small = DequantizeLinear (small_q, scale, zero)
    y = MatMul (small, w)
    shifted_q = QuantizeLinear (x, scale, one)
    shifted = DequantizeLinear (shifted_q, scale, one)
    z = MatMul (shifted, w)
    other_q = QuantizeLinear (x, scale, zero)
    kept = DequantizeLinear (other_q, scale, zero)
    other = Relu (kept)
}
"""


def zero_points(model: onnx.ModelProto) -> dict[str, str]:
    return {
        node.output[0]: node.input[2]
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }


def test_symmetric_inputs_of_gemms_become_unsigned_and_nothing_else_does() -> None:
    model = onnx.parser.parse_model(GRAPH)
    before = zero_points(model)
    assert make_inputs_unsigned(model) == 1
    onnx.checker.check_model(model, full_check=True)  # the declared type of the quantized tensor included
    changed = {name for name, zero in zero_points(model).items() if zero != before[name]}
    assert changed == {"small_q", "small"}
    assert zero_points(model)["small_q"] == ZERO_POINT


def test_every_value_is_the_same_also_where_it_saturates() -> None:
    # Halves are rounded to even in both forms: 0.25 / 0.5 is one. 63.5 and -64 are the ends of the range.
    x = np.array([[0.25, 0.75, -0.25, 63.5], [-64, 64, 1e6, -1e6], [0, -0.3, 63.8, -64.3]], np.float32)
    model = onnx.parser.parse_model(GRAPH)
    expected = ReferenceEvaluator(model).run(None, {"x": x})
    make_inputs_unsigned(model)
    for got, right in zip(ReferenceEvaluator(model).run(None, {"x": x}), expected, strict=True):
        np.testing.assert_array_equal(got, right)


def test_the_copy_that_openvino_reads_is_changed_and_the_graph_on_disk_is_not(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH), path)
    with inlined(path, make_inputs_unsigned) as copy:
        assert copy != path and ZERO_POINT in {t.name for t in onnx.load(copy).graph.initializer}
    assert ZERO_POINT not in {t.name for t in onnx.load(path).graph.initializer}
