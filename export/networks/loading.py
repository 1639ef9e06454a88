"""Load a checkpoint into export-grade networks, each tensor exactly once, and record where each one went.

Networks keep the checkpoint's module paths, so a parameter has the name of its tensor. The only thing that changes is
the shape of a convolution that a network holds as a Linear (`layers.ConvAsLinear`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ditc.export.checkpoint.release_memory import release_pages
from ditc.export.networks.layers import ConvAsLinear
from ditc.runtime.errors import CheckpointError

M = TypeVar("M", bound=nn.Module)
# What constructors of torch's and transformers' modules raise where settings contradict each other.
CONTRADICTIONS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
Transform = Literal["identity", "reshape"]
SHOWN = 3  # names in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """Which parameter of which stage holds one tensor of the checkpoint, and in which form.

    Attributes:
        checkpoint: the tensor's name in the checkpoint.
        transform: "reshape" means that the parameter holds the same values, in row-major order, in another shape.
        shape, dtype: of the tensor in the checkpoint. dtype is None if the checkpoint was not given.
    """

    checkpoint: str
    stage: str
    parameter: str
    transform: Transform
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


def check_layers(setting: str, layers: int, tensors: Collection[str], path: str) -> None:
    """Refuse a config with more layers than the weights have, before modules are made: 20,000 layers take minutes.

    Args:
        tensors: the checkpoint's names.
        path: module path of the list of layers, such as "transformer_blocks". Names may have other modules before it.

    Raises:
        CheckpointError: the message names the setting and both numbers.
    """
    numbered = re.compile(rf"(?:^|\.){re.escape(path)}\.(\d+)\.")
    found = {match[1] for match in map(numbered.search, tensors) if match}
    if layers > len(found):
        raise CheckpointError(
            f"{setting} is {layers} in config.json, but the weights have {len(found)} layers ({path})",
            hint="config.json and the weights belong to different models",
        )


def build_empty(make: Callable[[], M]) -> M:
    """Make a network in eval mode without allocating its weights. load_strict then gives it memory and values.

    Raises:
        CheckpointError: the network cannot be made, because settings of its config contradict each other.
    """
    with torch.device("meta"), contradictions_named():
        return make().eval().requires_grad_(False)


@contextmanager
def contradictions_named() -> Iterator[None]:
    """Turn the errors of a network's constructor into a CheckpointError that quotes them."""
    try:
        yield
    except CONTRADICTIONS as e:
        raise CheckpointError(
            f"no network can be made from the config.json: {type(e).__name__}: {e}",
            hint="its settings contradict each other: fetch the config.json again",
        ) from e


def load_strict(
    stages: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    unread: Collection[str] = (),
    exceptions: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Give every parameter and buffer of the stages its tensor, cast to dtype where it is floating-point.

    Args:
        unread: stages whose tensors must be in the checkpoint but are not loaded; the networks stay empty.
        exceptions: module paths of the checkpoint, each with the dtype that everything below it gets instead.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape, or it holds integers where floats belong.
    """
    sources = weight_map(stages)
    _check_names({source.checkpoint for source in sources}, set(tensors))
    states: dict[str, dict[str, Tensor]] = {stage: {} for stage in stages if stage not in unread}
    for source in sources:
        if source.stage in states:
            wanted = _dtype_of(source.checkpoint, dtype, exceptions or {})
            states[source.stage][source.parameter] = _fitted(source, stages[source.stage], tensors, wanted)
    for stage, state in states.items():
        stages[stage].load_state_dict(state, assign=True)
        stages[stage].requires_grad_(False)


def weight_map(
    stages: Mapping[str, nn.Module], tensors: Mapping[str, Tensor] | None = None
) -> list[WeightSource]:
    """List where each tensor of the checkpoint is in the stages, in the stages' order.

    A stage may wrap its network. The network's attribute `weights_below` is the path of the submodule whose parameters
    have the checkpoint's names; "" means the network itself.

    Args:
        tensors: the checkpoint's tensors, whose dtypes are recorded.

    Raises:
        CheckpointError: two stages hold the same tensor.
    """
    sources: dict[str, WeightSource] = {}
    for stage, module in stages.items():
        root = _root(module)
        conv_shapes = {
            f"{path}.weight": submodule.conv_shape
            for path, submodule in module.named_modules()
            if isinstance(submodule, ConvAsLinear)
        }
        for parameter, value in module.state_dict().items():
            name = parameter.removeprefix(root)
            if name in sources:
                raise CheckpointError(
                    f"{name} belongs to two stages, {sources[name].stage} and {stage}",
                    hint="give every tensor of the checkpoint to one stage only",
                )
            sources[name] = WeightSource(
                checkpoint=name,
                stage=stage,
                parameter=parameter,
                transform="reshape" if parameter in conv_shapes else "identity",
                shape=conv_shapes.get(parameter, tuple(value.shape)),
                dtype=None if tensors is None else tensors[name].dtype,
            )
    return list(sources.values())


class Without(Mapping[str, Tensor]):
    """A checkpoint's tensors without those that are not needed, such as a tied copy. Each is read when it is used."""

    def __init__(self, tensors: Mapping[str, Tensor], *names: str) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if name not in self._names)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _root(module: nn.Module) -> str:
    """The dotted prefix that the stage puts before the checkpoint's names."""
    for path, submodule in module.named_modules():
        below = getattr(submodule, "weights_below", None)
        if below is not None:
            return "".join(f"{part}." for part in (path, below) if part)
    return ""


def _dtype_of(name: str, dtype: torch.dtype, exceptions: Mapping[str, torch.dtype]) -> torch.dtype:
    return next((other for path, other in exceptions.items() if name.startswith(f"{path}.")), dtype)


def _fitted(
    source: WeightSource, module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    tensor = tensors[source.checkpoint]
    parameter = _state(module, source.parameter)
    if tuple(tensor.shape) != source.shape:
        raise CheckpointError(
            f"{source.checkpoint} has shape {tuple(tensor.shape)}, but its config asks for {source.shape}",
            hint="config.json and the weights belong to different models",
        )
    if not parameter.is_floating_point():
        return tensor.to(parameter.dtype)
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{source.checkpoint} has the type {tensor.dtype}, but quantized checkpoints are not supported",
            hint="use a checkpoint with floating-point weights",
        )
    fitted = tensor.to(dtype)
    if fitted.dtype is not tensor.dtype:
        release_pages(tensor)  # else a checkpoint in another type would be in memory twice
    return fitted.reshape(parameter.shape)


def _check_names(wanted: set[str], found: set[str]) -> None:
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    what = [f"lacks {_some(missing)}"] if missing else []
    if unknown:
        what.append(f"has {'an unknown tensor' if len(unknown) == 1 else 'unknown tensors'} {_some(unknown)}")
    if what:
        raise CheckpointError(
            f"the component {' and '.join(what)}",
            hint="config.json and the weights belong to different models, or the file belongs to another family",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _state(module: nn.Module, name: str) -> Tensor:
    """The module's parameter or buffer with that dotted name."""
    path, _, leaf = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(path), leaf)
    return value
