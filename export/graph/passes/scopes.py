"""Record for every node the PyTorch module that it comes from, because rewrite rules lose it for the nodes they make.

`pkg.torch.onnx.name_scopes` is the exporter's list of module paths from the root to the operation. Q/DQ placement,
the check of the fp32 islands and parity's bisection read it.
"""

from __future__ import annotations

import ast
from itertools import takewhile

import onnx_ir as ir

NAME_SCOPES = "pkg.torch.onnx.name_scopes"


def module_path(node: ir.Node) -> str | None:
    """The path of the innermost module that the node belongs to ("" is the root), or None if it is unknown."""
    scopes = scopes_of(node)
    return scopes[-2] if scopes is not None and len(scopes) > 1 else None


def scopes_of(node: ir.Node) -> list[str] | None:
    """The node's module paths from the root to the innermost, then the operation's name; None if unknown."""
    text = node.metadata_props.get(NAME_SCOPES)
    scopes: list[str] | None = ast.literal_eval(text) if text else None
    return scopes


def restore_scopes(model: ir.Model) -> None:
    """Assign every node without scopes to the innermost module that holds all of its neighbours, in place.

    For example, the halves of a split conv go to the conv's parent, not to the conv. The node's own name takes the
    place of the operation's name.
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
