"""Graph passes over onnx-ir models, one per file. Each leaves the outputs unchanged, which its test proves.

expand_repeats   copy a block that was traced once for every block like it (part of the trace)
simplify         fold constants, apply rewrite rules, share subexpressions; parameters stay whole and named
fold_transposes  make a Linear's weight the direct input of its MatMul
gather_rows      write a row gather as one Gather
fuse_rms_norms   write an RMS norm as one RMSNormalization, from opset 23 on
restore_scopes   record the PyTorch module of every node
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ditc.export.graph.passes.check_interface import check_interface
from ditc.export.graph.passes.gathers import gather_rows
from ditc.export.graph.passes.norms import fuse_rms_norms
from ditc.export.graph.passes.scopes import restore_scopes
from ditc.export.graph.passes.simplify import simplify
from ditc.export.graph.passes.transposes import fold_transposes
from ditc.runtime.spec import StageSpec

Pass = Callable[[ir.Model], None]

# The order matters: simplify brings out the Transposes and GatherNDs that the next two passes look for.
PASSES: tuple[Pass, ...] = (simplify, fold_transposes, gather_rows, fuse_rms_norms, restore_scopes)


def run_passes(model: ir.Model, spec: StageSpec) -> ir.Model:
    """Run all passes that every exported stage goes through, on the graph as torch.onnx.export leaves it.

    Raises:
        BuildError: the graph's inputs and outputs are not those of the spec.
    """
    for step in PASSES:
        step(model)
    check_interface(model, spec)
    return model
