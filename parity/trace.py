"""Trace what flows into and out of every module, in PyTorch and in an ONNX graph, under PyTorch's module names.

A Place is the first tensor that enters a module or leaves it, in the module's first call. In PyTorch, hooks observe the
places. In a graph, the name scopes of the nodes identify them: the last value that a node inside module M makes and a
node outside M reads is what leaves M. Tracers fetch a few places at a time, so that the activations of a network are
never in memory all at once.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import onnx_ir as ir
import torch
from torch import nn

from ditc.export.graph.passes.qdq import codes_of
from ditc.export.graph.passes.scopes import scopes_of
from ditc.export.graph.torch_session import TorchSession, from_torch
from ditc.runtime.cores import default_threads
from ditc.runtime.lora.inputs import WithLoras
from ditc.runtime.session import Array, Tensor, to_numpy

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
Kind = Literal["in", "out", "delta"]
Shape = tuple[int, ...] | None
# Several values leave a module that returns several tensors. The one closest to PyTorch's first tensor is compared.
MOST_CANDIDATES = 3


@dataclass(frozen=True, slots=True)
class Place:
    """One input or output of a module.

    Kind "delta" is output minus input: what a module adds to its input. It compares a module that includes its
    residual with one on the other side whose caller adds the residual.
    """

    module: str
    kind: Kind

    def __str__(self) -> str:
        return {"in": f"input of {self.module}", "out": f"output of {self.module}"}.get(
            self.kind, self.module
        )


@dataclass(frozen=True, slots=True)
class PlaceInfo:
    """What is known about a place before its values are fetched.

    Attributes:
        inputs: how many float tensors the module takes; 0 if that is not known.
    """

    place: Place
    shape: tuple[int, ...]
    size_bytes: int
    inputs: int = 0


class Tracer(Protocol):
    """One side of a comparison, for one fixed set of inputs."""

    def places(self) -> list[PlaceInfo]:
        """Every place, in execution order."""
        ...

    def fetch(self, wanted: Mapping[Place, Shape]) -> dict[Place, list[Array]]:
        """The values at some places, in the wanted shapes: several per place if a side cannot tell which is meant."""
        ...

    def close(self) -> None:
        """Release what tracing needed."""
        ...


class TorchTracer:
    """Traces a PyTorch network with hooks.

    Args:
        run: calls the network once with the fixed inputs.
        rename: maps a module's path to the name under which it is compared; None leaves the module out.
        deltas: whether places of kind "delta" are wanted as well.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable[[], object],
        rename: Callable[[str], str | None] = lambda path: path,
        *,
        deltas: bool = False,
    ) -> None:
        self._run, self._deltas = run, deltas
        named = ((rename(path), submodule) for path, submodule in module.named_modules() if path)
        self._modules = {name: submodule for name, submodule in named if name is not None}

    @classmethod
    def of_session(cls, session: Any, feeds: Mapping[str, Tensor]) -> TorchTracer:
        """Trace the `module` of a session, for one set of feeds."""
        return cls(session.module, lambda: session.run(feeds))

    def places(self) -> list[PlaceInfo]:
        seen: dict[Place, PlaceInfo] = {}

        def note(place: Place, tensor: torch.Tensor, inputs: int) -> None:
            if place.kind != "delta":
                size = tensor.numel() * tensor.element_size()
                seen[place] = PlaceInfo(place, tuple(tensor.shape), size, inputs)

        self._run_with_hooks(note)
        return list(seen.values())

    def fetch(self, wanted: Mapping[Place, Shape]) -> dict[Place, list[Array]]:
        kept: dict[Place, list[Array]] = {}

        def keep(place: Place, tensor: torch.Tensor, _: int) -> None:
            if place in wanted:
                kept[place] = [from_torch(tensor.clone())]

        self._run_with_hooks(keep)
        return kept

    def close(self) -> None:
        """Do nothing: the tracer holds nothing between calls."""

    def _run_with_hooks(self, note: Callable[[Place, torch.Tensor, int], None]) -> None:
        entered: set[str] = set()
        left: set[str] = set()

        def before(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                floats = _floats((*args, *kwargs.values()))
                if name not in entered and floats:
                    note(Place(name, "in"), floats[0], len(floats))
                entered.add(name)

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                results, floats = _floats((output,)), _floats((*args, *kwargs.values()))
                if name in left or not results:
                    return
                left.add(name)
                note(Place(name, "out"), results[0], len(floats))
                if self._deltas and floats and floats[0].shape == results[0].shape:
                    note(Place(name, "delta"), results[0] - floats[0], len(floats))

            return hook

        with ExitStack() as stack:
            for name, submodule in self._modules.items():
                for handle in (
                    submodule.register_forward_pre_hook(before(name), with_kwargs=True),
                    submodule.register_forward_hook(after(name), with_kwargs=True),
                ):
                    stack.callback(handle.remove)
            with torch.inference_mode():
                self._run()


class OnnxTracer:
    """Traces an ONNX graph in ONNX Runtime, with the places as additional outputs.

    The additional outputs keep ONNX Runtime from fusing operators across them. So this finds what is wrong in a graph,
    but not what is wrong in a fusion.
    """

    def __init__(self, model: ir.Model, feeds: Mapping[str, Tensor]) -> None:
        self._feeds = {name: to_numpy(feed) for name, feed in feeds.items()}
        self._values = places_of(model)
        self._reciprocals = reciprocals_of(model)
        names = {value.name for values in self._values.values() for value in values}
        self._folder = tempfile.TemporaryDirectory(prefix="ditc-trace-")
        self._session = _open_with_outputs(model, names, Path(self._folder.name))

    def places(self) -> list[PlaceInfo]:
        """Every place, without sizes. Their order and sizes come from PyTorch's side."""
        return [PlaceInfo(place, (), 0) for place in self._values]

    def fetch(self, wanted: Mapping[Place, Shape]) -> dict[Place, list[Array]]:
        chosen = {place: self._choose(place, shape) for place, shape in wanted.items()}
        names = sorted({name for some in chosen.values() for name in some} - self._feeds.keys())
        values = dict(zip(names, self._session.run(names, self._feeds), strict=True)) if names else {}
        for name in values.keys() & self._reciprocals.keys():
            values[name] = values[name] / self._reciprocals[name]
        values |= self._feeds
        return {place: [values[name] for name in some] for place, some in chosen.items() if some}

    def close(self) -> None:
        """Release the session and its temporary file."""
        if hasattr(self, "_session"):
            del self._session
            self._folder.cleanup()

    def _choose(self, place: Place, shape: Shape) -> list[str]:
        fitting = [value for value in self._values.get(place, ()) if _may_have(value, shape)]
        return [str(value.name) for value in fitting[:MOST_CANDIDATES]]


def places_of(model: ir.Model) -> dict[Place, list[ir.Value]]:
    """The float values that enter and leave every module, the most likely one first."""
    inside = {node: frozenset(scopes[:-1]) for node in model.graph if (scopes := scopes_of(node))}
    entering: dict[str, list[ir.Value]] = defaultdict(list)
    leaving: dict[str, list[ir.Value]] = defaultdict(list)
    for node in model.graph:
        modules = inside.get(node, frozenset[str]())
        for value in node.inputs:
            if value is None or value.is_initializer() or not _is_float(value):
                continue
            producer = value.producer()
            made_in = frozenset[str]() if producer is None else inside.get(producer, frozenset[str]())
            for module in modules - made_in:
                if value not in entering[module]:
                    entering[module].append(value)
        for value in node.outputs:
            if not _is_float(value):
                continue
            readers = [inside.get(use.node, frozenset[str]()) for use in value.uses()]
            for module in modules:
                if value.is_graph_output() or any(module not in reader for reader in readers):
                    leaving[module].insert(0, value)  # the last value comes first
    places = {Place(module, "in"): values for module, values in entering.items() if module}
    places |= {Place(module, "out"): values for module, values in leaving.items() if module}
    return places


def reciprocals_of(model: ir.Model) -> dict[str | None, Array]:
    """What SmoothQuant has multiplied values by before layers quantize them, by the value's name.

    The result of an adaptive norm leaves the norm's module smoothed, because its scale and shift are smoothed instead.
    """
    found: dict[str | None, Array] = {}
    for weight in model.graph.initializers.values():
        codes = codes_of(weight)
        if codes is None or codes.reciprocals is None:
            continue
        factors = model.graph.initializers[codes.reciprocals].const_value
        for dequantized in (use.node for use in weight.uses()):
            for gemm in (use.node for use in dequantized.outputs[0].uses()):
                quantize = _source(_source(gemm))
                if quantize is None or quantize.op_type != "QuantizeLinear" or factors is None:
                    continue
                divided = quantize.inputs[0]
                assert divided is not None
                found[divided.name] = factors.numpy()
    return found


def _source(node: ir.Node | None) -> ir.Node | None:
    """The node that makes the first input of a node; None for an input of the graph."""
    first = None if node is None else node.inputs[0]
    return None if first is None else first.producer()


def tracer_of(session: Any, feeds: Mapping[str, Tensor], model: Path | ir.Model | None) -> Tracer | None:
    """A tracer for a session.

    Args:
        model: the graph that the session was opened from; None for an engine.

    Returns:
        None for a session whose modules cannot be seen: it is not a PyTorch session, and there is no graph.
    """
    if isinstance(session, WithLoras):
        session, feeds = session.base, {**feeds, **session.matrices()}
    if isinstance(session, TorchSession) or hasattr(session, "module"):
        return TorchTracer.of_session(session, feeds)
    if model is None:
        return None
    return OnnxTracer(ir.load(model) if isinstance(model, Path) else model, feeds)


def _open_with_outputs(model: ir.Model, names: set[str | None], folder: Path) -> Any:
    import onnxruntime as ort

    copy = model.clone() if hasattr(model, "clone") else ir.from_proto(ir.to_proto(model))
    for node in copy.graph:
        for value in node.outputs:
            if value.name in names and not value.is_graph_output():
                copy.graph.outputs.append(value)
    ir.save(copy, folder / "traced.onnx", external_data="traced.data")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = default_threads()
    # Run Q/DQ as written, in fp32: the integer kernels that ONNX Runtime may fuse it into saturate on some CPUs, and
    # there are none for FP8.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(str(folder / "traced.onnx"), options, providers=["CPUExecutionProvider"])


def _floats(values: Iterable[Any]) -> list[torch.Tensor]:
    """The floating-point tensors in order, including those inside tuples and transformers' output objects."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found += [value] if value.is_floating_point() else []
        elif isinstance(value, (tuple, list)):
            found += _floats(value)
        elif isinstance(value, Mapping):
            found += _floats(value.values())
    return found


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype in FLOATS


def _may_have(value: ir.Value, shape: Shape) -> bool:
    if value.shape is None or shape is None:
        return True
    return len(value.shape) == len(shape) and all(
        not isinstance(known, int) or known == size for known, size in zip(value.shape, shape, strict=True)
    )
