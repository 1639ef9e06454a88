"""Which operators of an ONNX graph belong neither to ONNX, nor to ONNX Runtime, nor to the graph's own functions.

Read from the bytes of the protobuf message, without the package `onnx`, as `onnx_references.py` does.
"""

from __future__ import annotations

from pathlib import Path

from ditc.runtime.bundle.onnx_references import MESSAGES
from ditc.runtime.bundle.protobuf import fields

# What every build of ONNX Runtime has ("Contrib Operators").
KNOWN = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
# Numbers of fields in onnx.proto.
NODE_OP_TYPE, NODE_DOMAIN, FUNCTION_NAME, FUNCTION_DOMAIN = 4, 7, 1, 10


def foreign_operators(model: Path) -> list[str]:
    """The operators as domain::name, in alphabetical order. A function in the graph defines its own.

    Args:
        model: an .onnx file that `onnx_references` has accepted.
    """
    data = model.read_bytes()
    used: set[tuple[str, str]] = set()
    defined: set[tuple[str, str]] = set()
    open_messages = [("Model", 0, len(data))]
    while open_messages:
        kind, start, end = open_messages.pop()
        texts: dict[int, str] = {}
        for number, value in fields(data, start, end):
            if isinstance(value, int):
                continue
            if number in MESSAGES.get(kind, {}):
                open_messages.append((MESSAGES[kind][number], *value))
            elif kind in ("Node", "Function"):
                texts[number] = data[slice(*value)].decode(errors="replace")
        if kind == "Node":
            used.add((texts.get(NODE_DOMAIN, ""), texts.get(NODE_OP_TYPE, "")))
        elif kind == "Function":
            defined.add((texts.get(FUNCTION_DOMAIN, ""), texts.get(FUNCTION_NAME, "")))
    return sorted(f"{domain}::{name}" for domain, name in used - defined if domain not in KNOWN)
