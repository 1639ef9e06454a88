"""Loops in a graph that is rounded: one in fp32 stays as it is, one in 16 bits is refused.

Sinkhorn's, the only loop that ditc writes, is an fp32 island.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from ditc.export.graph.passes.round_to import round_to
from ditc.runtime.errors import BuildError
from ditc.runtime.spec import DType


def test_a_loop_in_fp32_is_left_alone_and_one_in_16_bits_is_refused() -> None:
    body = """
        looped = Loop (count, always, FIRST) <body = step (int64 i, bool go, TYPE[N] x) => (bool on, TYPE[N] y)
            { on = Identity (go) y = Mul (x, x) }>
    """
    source = """<ir_version: 10, opset_import: ["" : 20]>
    graph (float16[N] x) => (float16[N] out) <int64 count = {3}, bool always = {1}> { BEFORE LOOP AFTER }"""

    def model(loop_type: str) -> ir.Model:
        narrow = loop_type == "float16"
        loop = body.replace("TYPE", loop_type).replace("FIRST", "x" if narrow else "wide")
        before, after = (
            ("", "out = Mul (looped, x)")
            if narrow
            else (
                "wide = Cast <to = 1> (x)",
                "narrow = Cast <to = 10> (looped) out = Mul (narrow, x)",
            )
        )
        text = source.replace("BEFORE", before).replace("LOOP", loop).replace("AFTER", after)
        return ir.from_proto(onnx.parser.parse_model(text))

    round_to(model("float"), DType.FLOAT16)
    with pytest.raises(BuildError, match="branches of If and Loop"):
        round_to(model("float16"), DType.FLOAT16)
