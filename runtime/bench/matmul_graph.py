"""A graph of matrix products in ONNX's format, written without the package `onnx`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ditc.runtime.session import Array

IR_VERSION, OPSET = 8, 17
FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6  # of TensorProto.DataType


def matmul_graph(rows: int, width: int, layers: int, *, integers: bool) -> bytes:
    """Products of `x`, which has `rows` rows, with constant matrices of width x width.

    In fp32 each product is the input of the next one. Products of integers (uint8 by int8) have int32 results, so all
    of them read `x`, and every one is a result of the graph.
    """
    rng = np.random.default_rng(0)
    nodes, weights, outputs = [], [], []
    for layer in range(layers):
        left = "x" if integers or layer == 0 else f"y{layer - 1}"
        nodes.append(_node("MatMulInteger" if integers else "MatMul", (left, f"w{layer}"), f"y{layer}"))
        if integers:
            weight: Array = rng.integers(-127, 128, (width, width), np.int8)
        else:
            weight = (rng.standard_normal((width, width)) / width**0.5).astype(np.float32)
        weights.append(_tensor(f"w{layer}", weight, INT8 if integers else FLOAT))
        if integers or layer == layers - 1:
            outputs.append(_value(f"y{layer}", (rows, width), INT32 if integers else FLOAT))
    graph = b"".join(
        (
            *(_bytes(1, node) for node in nodes),
            _bytes(2, b"products"),
            *(_bytes(5, weight) for weight in weights),
            _bytes(11, _value("x", (rows, width), UINT8 if integers else FLOAT)),
            *(_bytes(12, output) for output in outputs),
        )
    )
    return _integer(1, IR_VERSION) + _bytes(7, graph) + _bytes(8, _integer(2, OPSET))


def _node(op: str, inputs: Iterable[str], output: str) -> bytes:
    return (
        b"".join(_bytes(1, name.encode()) for name in inputs)
        + _bytes(2, output.encode())
        + _bytes(4, op.encode())
    )


def _tensor(name: str, values: Array, kind: int) -> bytes:
    dims = b"".join(_integer(1, size) for size in values.shape)
    return dims + _integer(2, kind) + _bytes(8, name.encode()) + _bytes(9, values.tobytes())


def _value(name: str, shape: Iterable[int], kind: int) -> bytes:
    dims = b"".join(_bytes(1, _integer(1, size)) for size in shape)
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _integer(1, kind) + _bytes(2, dims)))


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
