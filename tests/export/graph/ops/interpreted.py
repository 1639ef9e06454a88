"""A script for test_kernels.py, which runs it as a process: Triton decides at import whether it interprets.

Argument: which op, relu or rotary.
"""

from __future__ import annotations

import json
import sys

import torch

from ditc.export.graph.ops.relu_linear_attention import triton_op as relu
from ditc.export.graph.ops.relu_linear_attention.reference import relu_linear_attention_reference
from ditc.export.graph.ops.relu_linear_attention.torch_op import DIFFUSERS_EPS, relu_linear_attention
from ditc.export.graph.ops.rotary_linear_attention import triton_op as rotary
from ditc.export.graph.ops.rotary_linear_attention.reference import rotary_linear_attention_reference
from ditc.export.graph.ops.rotary_linear_attention.torch_op import rotary_linear_attention

# B, N, H, D. In turn: Sana's head size, tokens that do not fill a block, several shares of tokens, a head dimension
# that is not a power of 2, a single token.
SHAPES = [(1, 64, 2, 32), (2, 100, 3, 32), (1, 600, 1, 32), (1, 65, 1, 24), (1, 1, 1, 16)]
FORMS = {
    "relu": {
        "exact": relu_linear_attention_reference,
        "pair": relu.relu_linear_attention_triton,
        "fused": relu.relu_linear_attention_fused,
        "op": relu_linear_attention,
    },
    "rotary": {
        "exact": rotary_linear_attention_reference,
        "pair": rotary.rotary_linear_attention_triton,
        "fused": rotary.rotary_linear_attention_fused,
        "op": rotary_linear_attention,
    },
}


def main(op: str) -> None:
    """Print the relative L2 error of both kernel forms and of the op against fp64, one JSON object per line."""
    torch.manual_seed(0)
    forms = FORMS[op]

    def tables(tokens: int, dim: int) -> tuple[torch.Tensor, ...]:
        angles = 6 * torch.rand(tokens, dim // 2)
        return (angles.cos(), angles.sin()) if op == "rotary" else ()

    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):
            inputs = *(torch.randn(shape).to(dtype) for _ in range(3)), *tables(shape[1], shape[3])
            values = {name: form(*inputs, DIFFUSERS_EPS).double() for name, form in forms.items()}
            exact = values.pop("exact")
            errors = {name: float((value - exact).norm() / exact.norm()) for name, value in values.items()}
            sys.stdout.write(json.dumps({"shape": shape, "dtype": str(dtype)} | errors) + "\n")
    q = torch.randn(1, 8, 1, 16)
    q[0, 3] = float("nan")
    out = forms["pair"](q, q.nan_to_num(), q.nan_to_num(), *tables(8, 16), DIFFUSERS_EPS)
    sys.stdout.write(
        json.dumps({"nan_rows": out.isnan().any(-1).flatten().nonzero().flatten().tolist()}) + "\n"
    )
    zero = torch.zeros(1, 8, 1, 16)
    out = forms["pair"](zero, zero, zero, *tables(8, 16), DIFFUSERS_EPS)
    sys.stdout.write(json.dumps({"zeros": out.abs().max().item()}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
