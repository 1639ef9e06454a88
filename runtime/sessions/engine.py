"""The interface to an engine library: what a session needs to plan buffers, set addresses and run.

`tensorrt_engine.py` implements it with TensorRT, and the tests with ONNX Runtime over host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ditc.runtime.session import Array
from ditc.runtime.spec import DType

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Binding:
    """An input or output of an engine. on_host: the library reads it from host memory, because it is a shape input."""

    name: str
    dtype: DType
    is_input: bool
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The smallest and the largest shape of an input in one profile."""

    min: Shape
    max: Shape

    def __contains__(self, shape: Shape) -> bool:
        return len(shape) == len(self.max) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


class Context(Protocol):
    """An execution context: one profile of an engine with its shapes and addresses. It owns no device memory."""

    def set_shape(self, name: str, shape: Shape) -> bool:
        """Set the shape of an input. False if the library refuses it."""
        ...

    def shape(self, name: str) -> Shape:
        """The shape of an output, once the shapes of all inputs are set. A size is -1 if it depends on values."""
        ...

    def set_address(self, name: str, pointer: int) -> None:
        """Set the address of an input or output. Raises SessionError if the library refuses it."""
        ...

    def workspace_bytes(self) -> int:
        """The size of the workspace that a run with the current shapes needs."""
        ...

    def set_workspace(self, pointer: int, size_bytes: int) -> None: ...

    def enqueue(self, stream: int) -> bool:
        """Put one run into the stream. False if the library refuses."""
        ...

    def capturable(self, stream: int) -> bool:
        """Whether a run can be captured in a CUDA graph, as far as the library can say in advance."""
        ...


class Engine(Protocol):
    """A deserialised engine."""

    @property
    def bindings(self) -> tuple[Binding, ...]: ...
    @property
    def profiles(self) -> tuple[Mapping[str, ShapeRange], ...]: ...

    def context(self, profile: int, stream: int) -> Context:
        """Make a context for a profile, given by its index. `stream` is the stream that will run it."""
        ...

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Replace weights by name, before the first context is made; bf16 numbers as uint16 arrays of their bits.

        Raises SessionError if the engine was not built for that, or lacks one of them.
        """
        ...

    def last_error(self) -> str:
        """The library's last error message, in one line."""
        ...

    def close(self) -> None: ...
