"""A script for test_kernels.py, which runs it as a process: Triton decides at import whether it interprets."""

from __future__ import annotations

import json
import sys

import torch

from ditc.export.graph.ops.relu_linear_attention import triton_op
from ditc.export.graph.ops.relu_linear_attention.reference import relu_linear_attention_reference
from ditc.export.graph.ops.relu_linear_attention.torch_op import DIFFUSERS_EPS, relu_linear_attention

# B, N, H, D. In turn: Sana's head size, tokens that do not fill a block, several shares of tokens, a head dimension
# that is not a power of 2, a single token.
SHAPES = [(1, 64, 2, 32), (2, 100, 3, 32), (1, 600, 1, 32), (1, 65, 1, 24), (1, 1, 1, 16)]


def main() -> None:
    """Print the relative L2 error of both kernel forms and of the op against fp64, one JSON object per line."""
    torch.manual_seed(0)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):
            q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))
            exact = relu_linear_attention_reference(q, k, v, DIFFUSERS_EPS)
            forms = {
                "pair": triton_op.relu_linear_attention_triton,
                "fused": triton_op.relu_linear_attention_fused,
                "op": relu_linear_attention,
            }
            errors = {
                name: float((form(q, k, v, DIFFUSERS_EPS).double() - exact).norm() / exact.norm())
                for name, form in forms.items()
            }
            sys.stdout.write(json.dumps({"shape": shape, "dtype": str(dtype)} | errors) + "\n")
    q = torch.randn(1, 8, 1, 16)
    q[0, 3] = float("nan")
    out = triton_op.relu_linear_attention_triton(q, q.nan_to_num(), q.nan_to_num(), DIFFUSERS_EPS)
    sys.stdout.write(
        json.dumps({"nan_rows": out.isnan().any(-1).flatten().nonzero().flatten().tolist()}) + "\n"
    )
    zero = torch.zeros(1, 8, 1, 16)
    out = triton_op.relu_linear_attention_triton(zero, zero, zero, DIFFUSERS_EPS)
    sys.stdout.write(json.dumps({"zeros": out.abs().max().item()}) + "\n")


if __name__ == "__main__":
    main()
