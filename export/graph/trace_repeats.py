"""Trace equal blocks once: torch.export takes seconds per block, and a transformer has dozens of them.

While a network is traced, the first of several equal blocks runs in full, between an Enter and a Leave node. Every
later one leaves a single Repeat node with its inputs. passes/expand_repeats.py replaces that node by a copy of the
first block's nodes with the later block's weights. A later block whose call differs from the first block's is traced
in full, and so is one that leaves something in an argument (an object whose `collects` is true).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ditc.export.graph.passes.expand_repeats import BLOCK, DOMAIN, ENTER, LEAVE, REPEAT, TEMPLATE

Forward = Callable[..., Any]

_INTERNAL = frozenset(nn.Module().__dict__)
# The index that transformers gives its layers. Their caches read it, but their arithmetic does not.
_POSITION = frozenset({"layer_idx"})


@dataclass(frozen=True, slots=True)
class _Call:
    """Inputs and outputs of the first block, as the trace sees them."""

    inputs: list[Any]
    spec: pytree.TreeSpec
    outputs: list[Any]
    output_spec: pytree.TreeSpec


@contextmanager
def trace_blocks_once(root: nn.Module) -> Iterator[None]:
    """While the context lasts, a trace of root holds one block of each group of equal ones, and Repeat nodes."""
    before: list[tuple[nn.Module, Forward | None]] = []
    resets: list[Callable[[], None]] = []

    def replace(module: nn.Module, forward: Forward) -> None:
        before.append((module, vars(module).get("forward")))
        module.forward = forward

    try:
        for blocks in repeated_blocks(root):
            (path, first), *others = blocks.items()
            repeated = _RepeatedBlock(path)
            resets.append(repeated.reset)
            replace(first, repeated.first(first.forward))
            for name, block in others:
                replace(block, repeated.later(name, block.forward))
        replace(root, _after(resets, root.forward))
        yield
    finally:
        for module, own in before:
            del module.forward
            if own is not None:
                module.forward = own


def repeated_blocks(module: nn.Module, path: str = "") -> list[dict[str, nn.Module]]:
    """Groups of equal blocks that are in one ModuleList or Sequential: module path -> block.

    A group has at least two blocks, with parameters. The insides of its blocks are not searched.
    """
    groups: list[dict[str, nn.Module]] = []
    children = {f"{path}.{name}" if path else name: child for name, child in module.named_children()}
    if isinstance(module, nn.ModuleList | nn.Sequential):
        for name, child in children.items():
            same = (group for group in groups if same_structure(_first(group), child))
            group = next(same, None)
            if group is None:
                groups.append({name: child})
            else:
                group[name] = child
        groups = [
            group for group in groups if len(group) > 1 and any(True for _ in _first(group).parameters())
        ]
    grouped = {name for group in groups for name in group}
    inner = (repeated_blocks(child, name) for name, child in children.items() if name not in grouped)
    return groups + [group for several in inner for group in several]


def same_structure(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules compute the same function of their weights, as far as their attributes tell."""
    return (
        type(a) is type(b)
        and _tensors(a) == _tensors(b)
        and _same_attributes(a, b)
        and [name for name, _ in a.named_children()] == [name for name, _ in b.named_children()]
        and all(map(same_structure, a.children(), b.children()))
    )


class _RepeatedBlock:
    """The forward functions of a group of equal blocks. path: the first block's module path."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.call: _Call | None = None

    def reset(self) -> None:
        self.call = None

    def first(self, forward: Forward) -> Forward:
        """A forward that runs the block between its Enter and Leave nodes, and remembers the call."""

        @functools.wraps(forward)
        def marked(*args: Any, **kwargs: Any) -> Any:
            inputs, spec = pytree.tree_flatten((args, kwargs))
            if self.call is not None or any(map(_collects, inputs)):
                return forward(*args, **kwargs)
            entered = _node(ENTER, {BLOCK: self.path}, inputs, like=inputs)
            args, kwargs = pytree.tree_unflatten(entered, spec)
            outputs, output_spec = pytree.tree_flatten(forward(*args, **kwargs))
            self.call = _Call(inputs, spec, outputs, output_spec)
            return pytree.tree_unflatten(_node(LEAVE, {BLOCK: self.path}, outputs, like=outputs), output_spec)

        return marked

    def later(self, path: str, forward: Forward) -> Forward:
        """A forward that leaves one Repeat node if the call is like the first block's, else runs the block."""

        @functools.wraps(forward)
        def repeated(*args: Any, **kwargs: Any) -> Any:
            inputs, spec = pytree.tree_flatten((args, kwargs))
            call = self.call
            if call is None or spec != call.spec or not all(map(_alike, inputs, call.inputs)):
                return forward(*args, **kwargs)
            attributes = {BLOCK: path, TEMPLATE: self.path}
            outputs = _node(REPEAT, attributes, inputs, like=call.outputs)
            return pytree.tree_unflatten(outputs, call.output_spec)

        return repeated


def _node(operator: str, attributes: dict[str, str], inputs: list[Any], *, like: list[Any]) -> list[Any]:
    """Add a node over the tensors among `inputs`; return `like` with its tensors replaced by the node's outputs."""
    wanted = [leaf for leaf in like if isinstance(leaf, Tensor)]
    made = iter(
        torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{operator}",
            [leaf for leaf in inputs if isinstance(leaf, Tensor)],
            attributes,
            dtypes=[tensor.dtype for tensor in wanted],
            shapes=[tensor.shape for tensor in wanted],
        )
    )
    return [next(made) if isinstance(leaf, Tensor) else leaf for leaf in like]


def _collects(argument: Any) -> bool:
    return getattr(argument, "collects", False) is True


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and list(map(_size, a.shape)) == list(map(_size, b.shape))
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return bool(_size(a) == _size(b))
    return _equal(a, b)


def _size(size: Any) -> Any:
    """The expression of a symbolic size. Comparing the sizes themselves would add a guard to the trace."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _after(resets: list[Callable[[], None]], forward: Forward) -> Forward:
    """A forward that resets first, because torch.export runs a network more than once."""

    @functools.wraps(forward)
    def fresh(*args: Any, **kwargs: Any) -> Any:
        for reset in resets:
            reset()
        return forward(*args, **kwargs)

    return fresh


def _tensors(module: nn.Module) -> dict[str, Any]:
    own = (module._parameters | module._buffers).items()
    return {name: None if value is None else (value.shape, value.dtype) for name, value in own}


def _same_attributes(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = (
        {k: v for k, v in vars(module).items() if k not in _INTERNAL | _POSITION} for module in (a, b)
    )
    return mine.keys() == theirs.keys() and all(_equal(mine[name], theirs[name]) for name in mine)


def _equal(a: Any, b: Any) -> bool:
    # An activation function with its arguments: two equal partials do not compare equal.
    if isinstance(a, functools.partial) and isinstance(b, functools.partial):
        return (a.func, a.args, a.keywords) == (b.func, b.args, b.keywords)
    if isinstance(a, Tensor):
        return a is b
    return a is b or (type(a) is type(b) and bool(a == b))


def _first(group: dict[str, nn.Module]) -> nn.Module:
    return next(iter(group.values()))
