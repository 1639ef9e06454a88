"""Fold constants, apply onnxscript's rewrite rules and share common subexpressions, whatever values parameters have.

This is what torch.onnx.export(optimize=True) runs (onnxscript 0.7.2, optimizer/_optimizer.py), except that parameters

- are not folded: a Linear's transposed weight would become the anonymous val_62;
- are not rewritten: a bias of zeros would vanish, and with it the place where another checkpoint's bias goes;
- are not merged if equal: norm_k.weight would become norm_q.weight where both are ones.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from ditc.export.graph.passes.parameters import hidden_values

# Constants larger than these are not folded. The limits are onnxscript's own.
INPUT_SIZE_LIMIT = 8192
OUTPUT_SIZE_LIMIT = 512 * 512
ROUNDS = 2
# Those of onnxscript's default rules that find something in exported diffusion transformers. Matching all 46 takes six
# times as long, and the others fold a parameter (batch norm into conv, pad into conv, a zero bias).
RULES = (
    *rules.mul_by_1_rule.commute(),
    *rules.add_0_rule.commute(),
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.materialize_reshape_shape_rule,
    rules.max_min_rule,
    rules.min_max_rule,
    rules.collapse_slice_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
)


def simplify(model: ir.Model) -> None:
    """Fold and rewrite in place. Every initializer of the given graph is a parameter, and stays if it is used."""
    steps = ir.passes.PassManager(
        [
            FoldConstantsPass(
                shape_inference=True, input_size_limit=INPUT_SIZE_LIMIT, output_size_limit=OUTPUT_SIZE_LIMIT
            ),
            RewritePass(RULES),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]  # onnx-ir 1.1.0 left it untyped
            common.RemoveUnusedOpsetsPass(),
        ],
        steps=ROUNDS,
        early_stop=True,
    )
    with hidden_values(dict(model.graph.initializers)):
        common.InlinePass()(model)
        steps(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.LiftSubgraphInitializersToMainGraphPass()(model)
        _share_constants(model)
        common.CommonSubexpressionEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
        common.OutputFixPass()(model)
        common.NameFixPass()(model)


def _share_constants(model: ir.Model) -> None:
    """Keep one initializer for equal small constants. Parameters have no values here, so they are not shared."""
    seen: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.size > INPUT_SIZE_LIMIT:
            continue
        kept = seen.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]
