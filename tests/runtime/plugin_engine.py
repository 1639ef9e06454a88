"""Builds an engine for each file of kernels. test_plugin.py runs it in a separate process: KERNELS.json ..."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
from onnx import parser

from ditc.export.engine.tensorrt import Compiler, load_library
from ditc.runtime.plugins import register
from ditc.runtime.spec import Backend

GRAPH = """<ir_version: 10, opset_import: ["": 20, "ditc": 1]>
    net (float[2, 64, 4, 32] x, float[64, 16] angles) => (float[2, 64, 4, 32] y)
    {
        cos = Cos (angles)
        sin = Sin (angles)
        q = Relu (x)
        a = ditc.ReluLinearAttention <eps = 1e-15, plugin_namespace = "ditc", plugin_version = "1"> (q, x, x)
        b = ditc.RotaryLinearAttention <eps = 1e-15, plugin_namespace = "ditc", plugin_version = "1">
            (a, x, x, cos, sin)
        y = Relu (b)
    }"""


def main(kernels: Path) -> None:
    model = parser.parse_model(GRAPH)
    for node in model.graph.node:
        if node.domain == "ditc":
            text = kernels.read_text().replace("kv_kernel", node.op_type)
            node.attribute.append(onnx.helper.make_attribute("kernels", text))
    onnx.save(model, kernels.with_suffix(".onnx"))
    compiler = Compiler(Backend.TENSORRT_RTX, plugins=True)
    complaint = compiler.parse(kernels.with_suffix(".onnx"))
    if complaint is not None:
        sys.exit(complaint)
    compiler.set_targets(("sm89",))
    with kernels.with_suffix(".engine").open("wb") as file:
        if not compiler.build(file):
            sys.exit("; ".join(compiler.errors()))


if __name__ == "__main__":
    register(load_library(Backend.TENSORRT_RTX))
    for name in sys.argv[1:]:
        main(Path(name))
