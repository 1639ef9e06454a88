"""What a session needs of an engine library: enough to plan buffers, bind addresses and enqueue.

`tensorrt_engine.py` is this over TensorRT. The tests put ONNX Runtime over host memory in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ditc.runtime.spec import DType

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Binding:
    """An input or output of an engine. on_host: the library reads it from host memory (a shape input)."""

    name: str
    dtype: DType
    is_input: bool
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """Smallest and largest shape of an input in one profile."""

    min: Shape
    max: Shape

    def __contains__(self, shape: Shape) -> bool:
        return len(shape) == len(self.max) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


class Context(Protocol):
    """One profile of an engine, ready to run; holds shapes and addresses, no memory of its own."""

    def set_shape(self, name: str, shape: Shape) -> bool: ...
    def shape(self, name: str) -> Shape:
        """Of an output, once all inputs have theirs; -1 where it depends on data."""
        ...

    def set_address(self, name: str, pointer: int) -> None:
        """Raises SessionError when the library refuses it."""
        ...

    def workspace_bytes(self) -> int:
        """What a run needs beside its tensors, for the shapes that are set."""
        ...

    def set_workspace(self, pointer: int, size_bytes: int) -> None: ...
    def enqueue(self, stream: int) -> bool: ...
    def capturable(self, stream: int) -> bool: ...


class Engine(Protocol):
    """A deserialised engine."""

    @property
    def bindings(self) -> tuple[Binding, ...]: ...
    @property
    def profiles(self) -> tuple[Mapping[str, ShapeRange], ...]: ...

    def context(self, profile: int, stream: int) -> Context:
        """stream: the one that the context will be enqueued in."""
        ...

    def last_error(self) -> str:
        """What the library said last, one line."""
        ...

    def close(self) -> None: ...
