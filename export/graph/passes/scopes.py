"""Every node knows the PyTorch module that it came from: rewrite rules that make new nodes forget it.

`pkg.torch.onnx.name_scopes` is the exporter's list of module paths from the root to the operation. Q/DQ placement,
the islands' check and parity's bisection read it.
"""

from __future__ import annotations

import ast
from itertools import takewhile

import onnx_ir as ir

NAME_SCOPES = "pkg.torch.onnx.name_scopes"


def module_path(node: ir.Node) -> str | None:
    """The innermost module that the node belongs to ("" is the root), or None where that is not known."""
    scopes = scopes_of(node)
    return scopes[-2] if scopes is not None and len(scopes) > 1 else None


def scopes_of(node: ir.Node) -> list[str] | None:
    """Module paths from the root to the innermost, then the operation's own name."""
    text = node.metadata_props.get(NAME_SCOPES)
    scopes: list[str] | None = ast.literal_eval(text) if text else None
    return scopes


def restore_scopes(model: ir.Model) -> None:
    """Give a node without scopes the innermost module that holds all of its neighbours, in place.

    The halves of a split conv belong to the conv's parent, not to the conv. The operation's name becomes the node's.
    """
    for node in model.graph:
        if NAME_SCOPES in node.metadata_props:
            continue
        paths = [scopes[:-1] for scopes in map(scopes_of, _neighbours(node)) if scopes]
        if paths:
            shared = [level[0] for level in takewhile(_agree, zip(*paths, strict=False))]
            node.metadata_props[NAME_SCOPES] = str([*shared, node.name or node.op_type])


def _neighbours(node: ir.Node) -> list[ir.Node]:
    producers = [value.producer() for value in node.inputs if value is not None]
    consumers = [use.node for value in node.outputs for use in value.uses()]
    return [neighbour for neighbour in (*producers, *consumers) if neighbour is not None]


def _agree(level: tuple[str, ...]) -> bool:
    return len(set(level)) == 1
