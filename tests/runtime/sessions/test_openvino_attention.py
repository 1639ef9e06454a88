"""Attention of a bf16 model is computed whole in fp32 where that is faster: the same function, less rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import need_openvino

from ditc.runtime.sessions.openvino import settings
from ditc.runtime.sessions.openvino_attention import widen_attention
from ditc.runtime.sessions.openvino_library import core, load_openvino

B, N, S, H, D = 2, 8, 11, 2, 12
# bf16 keeps 8 bits. Queries, keys, values and result are rounded to it, which leaves 2e-3 to 4e-3 of the result.
BF16_RELATIVE_L2 = 6e-3


def attention_model(
    *, softcap: bool = False, keys_transposed: bool = True, scores_read_twice: bool = False
) -> Any:
    """Attention as ditc's bf16 graphs have it: bf16 products, an fp32 mask and softmax, and casts between them."""
    ops, openvino = load_openvino().opset13, load_openvino()
    q, k, v = (
        ops.parameter([B, n, H * D], openvino.Type.f32, name=name)
        for name, n in zip("qkv", (N, S, S), strict=True)
    )
    mask = ops.parameter([B, 1, 1, S], openvino.Type.f32, name="mask")

    def heads(x: Any, tokens: int, order: list[int]) -> Any:
        narrow = ops.convert(x, "bf16")
        return ops.transpose(ops.reshape(narrow, np.array([B, tokens, H, D]), False), np.array(order))

    key = heads(k, S, [0, 2, 3, 1] if keys_transposed else [0, 2, 1, 3])
    scores = ops.convert(ops.matmul(heads(q, N, [0, 2, 1, 3]), key, False, not keys_transposed), "f32")
    logits = ops.multiply(ops.tanh(scores), np.float32(2)) if softcap else scores
    weights = ops.convert(ops.softmax(ops.add(logits, mask), -1), "bf16")
    out = ops.transpose(ops.matmul(weights, heads(v, S, [0, 2, 1, 3]), False, False), np.array([0, 2, 1, 3]))
    out = ops.convert(ops.reshape(out, np.array([B, N, H * D]), False), "f32")
    results = [ops.result(out)] + ([ops.result(scores)] if scores_read_twice else [])
    return openvino.Model(results, [q, k, v, mask])


def inputs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, n, H * D)).astype(np.float32) for n in (N, S, S))
    mask = np.zeros((B, 1, 1, S), np.float32)
    mask[1, ..., 5:] = -10000
    return [q, k, v, mask]


def expected(q: Any, k: Any, v: Any, mask: Any, softcap: bool) -> Any:
    q, k, v = (x.astype(np.float64).reshape(B, -1, H, D).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2)
    weights = np.exp((np.tanh(scores) * 2 if softcap else scores) + mask)
    out = weights @ v / weights.sum(-1, keepdims=True)
    return out.transpose(0, 2, 1, 3).reshape(B, N, H * D)


@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("keys_transposed", [False, True])
def test_the_attention_is_the_same_function(softcap: bool, keys_transposed: bool) -> None:
    need_openvino()
    model = attention_model(softcap=softcap, keys_transposed=keys_transposed)
    shapes = [output.shape for output in model.outputs]
    assert widen_attention(model) == 1
    assert [output.shape for output in model.outputs] == shapes
    products = [op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"]
    assert {op.output(0).get_element_type().get_type_name() for op in products} == {"f32"}
    feeds = inputs()
    got = core().compile_model(model, "CPU", settings("CPU", 1))(feeds)[0]
    right = expected(*feeds, softcap)
    assert np.linalg.norm(got - right) <= BF16_RELATIVE_L2 * np.linalg.norm(right)


def test_an_attention_whose_scores_go_elsewhere_too_stays_as_it_is() -> None:
    need_openvino()
    assert widen_attention(attention_model(scores_read_twice=True)) == 0


def test_an_attention_in_fp32_stays_as_it_is() -> None:
    need_openvino()
    model = attention_model()
    assert (widen_attention(model), widen_attention(model)) == (1, 0)
