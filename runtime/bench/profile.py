"""Where the time of a stage goes, by PyTorch module: what the profilers of all backends report, in one form."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ditc.runtime.bench.flops import CONVOLUTIONS, LINEAR_ATTENTION, PRODUCTS
from ditc.runtime.bench.graph import Graph
from ditc.runtime.session import Session

# Words in the kinds of executed nodes that multiply matrices.
_PRODUCT_KINDS = ("MatMul", "FullyConnected", "Conv", "Gemm")
_HEAVY = PRODUCTS | CONVOLUTIONS.keys() | LINEAR_ATTENTION


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutedNode:
    """A node as a library executes it, after its fusions.

    Attributes:
        kind: what it computes, in the library's words.
        type: the type that it computes in, in the library's words; "" if it does not say.
        seconds: the time of one run.
        origins: names of the graph's nodes that it is made of, as far as the library says.
    """

    name: str
    kind: str
    type: str
    seconds: float
    origins: tuple[str, ...] = ()


class ProfiledSession(Session, Protocol):
    """A session that keeps the time of every node."""

    def executed_nodes(self) -> list[ExecutedNode]:
        """The nodes in the order of execution, with the mean time of the runs after the first. Ends the profile."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleTime:
    """Time of one run that is spent in a module itself, outside of its children.

    Attributes:
        module: the module's path, such as "network.transformer_blocks.0.attn1.to_q"; "" is the stage's root.
        kinds: the seconds by kind of node.
    """

    module: str
    seconds: float
    kinds: dict[str, float]


def by_module(nodes: Sequence[ExecutedNode], graph: Graph) -> list[ModuleTime]:
    """Add up the nodes by module, in the order in which modules are first executed."""
    seconds: dict[str, float] = defaultdict(float)
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for node, module in zip(nodes, modules_of(nodes, graph), strict=True):
        seconds[module] += node.seconds
        kinds[module][f"{node.kind} {node.type}".strip()] += node.seconds
    return [ModuleTime(module=m, seconds=total, kinds=dict(kinds[m])) for m, total in seconds.items()]


def modules_of(nodes: Sequence[ExecutedNode], graph: Graph) -> list[str]:
    """The module of every node.

    A node that holds a product or a convolution belongs to that one's module, whatever was fused into it; one that is
    made of others, to the innermost module that holds them all. Nodes that the graph does not have, because a library
    or a function brought them in, belong to the innermost module that holds the nodes before and after them.
    """
    known: dict[str, tuple[str, str]] = {}
    for each in graph.nodes:
        if each.scopes:
            for name in (each.name, *each.outputs):  # a library may name a node after its result
                known.setdefault(name, (each.op, each.scopes[-1]))
    found = [_own_module(node, known) for node in nodes]
    before: list[str | None] = []
    last = None
    for module in found:
        last = module if module is not None else last
        before.append(last)
    modules: list[str] = []
    following = None
    for module, previous in zip(reversed(found), reversed(before), strict=True):
        following = module if module is not None else following
        near = [each for each in (previous, following) if each is not None]
        modules.append(module if module is not None else common_module(near))
    return modules[::-1]


def common_module(modules: Sequence[str]) -> str:
    """The innermost module that holds all of these; "" if they share none."""
    if not modules:
        return ""
    paths = [module.split(".") for module in modules]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])


def pattern(module: str) -> str:
    """The module's path with a star for every number, so that equal layers of all blocks have one pattern."""
    return re.sub(r"(^|\.)[0-9]+(?=\.|$)", r"\1*", module)


def graph_names(node: ExecutedNode) -> list[str]:
    """Names of the graph's nodes or results that an executed node may be made of, in order."""
    return [_name_in(name) for name in (*node.origins, node.name)]


def by_pattern(modules: Iterable[ModuleTime]) -> dict[str, float]:
    """Seconds by pattern of the path."""
    seconds: dict[str, float] = defaultdict(float)
    for each in modules:
        seconds[pattern(each.module) or "(root)"] += each.seconds
    return dict(seconds)


def by_kind(modules: Iterable[ModuleTime]) -> dict[str, float]:
    """Seconds by kind of node, the largest first."""
    seconds: dict[str, float] = defaultdict(float)
    for each in modules:
        for kind, amount in each.kinds.items():
            seconds[kind] += amount
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _own_module(node: ExecutedNode, known: Mapping[str, tuple[str, str]]) -> str | None:
    found = list(dict.fromkeys(known[name] for name in graph_names(node) if name in known))
    if not found:
        return None
    # What libraries fuse into a product follows it. The first of its nodes may be the addition of its bias.
    first = found[0][1] if any(word in node.kind for word in _PRODUCT_KINDS) else None
    product = next((module for op, module in found if op in _HEAVY), first)
    return product if product is not None else common_module([module for _, module in found])


def _name_in(name: str) -> str:
    """The graph's name in a library's.

    OpenVINO and ONNX Runtime add parts such as "/WithoutBiases". ONNX Runtime 1.32 adds "_token_7" to names that would
    come twice, and "_nchwc" to those of the results of convolutions in its own layout.
    """
    return re.sub(r"_token_[0-9]+$", "", name.split("/", 1)[0]).removesuffix("_nchwc")
