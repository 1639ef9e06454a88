"""The interface between the pipeline and the backends: a Session runs one stage, from tensors to tensors.

A tensor is a numpy array or a buffer on a device, which only its backend looks into. A session keeps no state of a
request, so it can serve any number of interleaved requests, from any number of threads. One whose buffers or library do
not allow concurrent runs lets threads take turns. The results of a run belong to its caller: no later run writes to
them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.errors import SessionError
from ditc.runtime.spec import SIXTEEN_BITS, DType, Precision, StageSpec

Array = NDArray[Any]


@runtime_checkable
class DeviceTensor(Protocol):
    """A tensor in device memory. `numpy()` copies it to the host."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def numpy(self) -> Array: ...

    def narrow(self, start: int, stop: int) -> DeviceTensor:
        """The entries from start up to stop of the first dimension, in the same memory."""
        ...

    def assign(self, start: int, source: Tensor) -> None:
        """Copy the source over the entries from `start` on. Only the code that made the tensor may write to it.

        Raises:
            SessionError: the source has another element type, or entries of another shape.
        """
        ...


Tensor = Array | DeviceTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeDevice:
    """Where a session computes, and what its results can prove.

    Attributes:
        kind: the kind of processor. "other" is that of a reference in PyTorch, or Intel's GPU or NPU.
        name: what computes there, for messages, such as "ONNX Runtime's CPU provider".
        native_16_bits: whether 16-bit stages are computed in 16 bits. If not, results do not show their rounding.
        tried_at_build: whether every build runs its graphs on such a device, so that its first use needs no self-test.
            Other devices need one per machine, because kernels depend on the processor and the driver.
    """

    kind: Literal["cpu", "cuda", "other"]
    name: str
    native_16_bits: bool = True
    tried_at_build: bool = False

    def widens(self, precision: Precision) -> bool:
        """Whether a stage of this precision is computed in a wider type on this device."""
        return precision in SIXTEEN_BITS and not self.native_16_bits


class Session(Protocol):
    """Runs one stage. Inputs are named as in `spec.inputs`, results as in `spec.outputs`. Threads can share it."""

    @property
    def spec(self) -> StageSpec: ...

    @property
    def device(self) -> ComputeDevice: ...

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the stage once.

        Args:
            feeds: the inputs, by name.

        Raises:
            SessionError: an input is missing, or its element type or shape does not fit the spec.
        """
        ...

    def close(self) -> None:
        """Release everything that the session owns. May be called more than once."""
        ...


@runtime_checkable
class LoopSession(Protocol):
    """A session that can run a stage several times in one launch, with outputs fed back on the device."""

    def run_loop(
        self,
        feeds: Mapping[str, Tensor],
        per_step: Sequence[Mapping[str, Array]],
        *,
        carry: Mapping[str, str],
        keep: Collection[str],
    ) -> dict[str, Tensor]:
        """Run the stage once per entry of per_step.

        Args:
            feeds: the inputs that are the same in all steps, and the first values of those that are fed back.
            per_step: the inputs that differ by step, one entry per step.
            carry: names of outputs that are fed back, and the inputs that they become in the next step.
            keep: names of outputs that are wanted from every step.

        Returns:
            All outputs of the last step. Those in `keep` have an additional first dimension with one entry per step.

        Raises:
            SessionError: for the reasons of `run`.
        """
        ...


@runtime_checkable
class DeviceSession(Protocol):
    """A session whose tensors are in device memory. Callers who stack several inputs get the memory from it."""

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceTensor:
        """A tensor with undefined content, for `assign`. Raises SessionError if the memory does not suffice."""
        ...


@runtime_checkable
class CompilingSession(Protocol):
    """A session that compiles its stage when shapes run for the first time."""

    def compile_ahead(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Begin to compile for these shapes of the inputs while the caller goes on. A run of them waits for the end.

        Nothing is done if they are compiled, if there is no room for them, or if the session has only one thread. What
        goes wrong is raised by the run.
        """
        ...


def closed(spec: StageSpec) -> SessionError:
    """The error of a run after `close`, which may come from another thread."""
    return SessionError(f"{spec.name}: the session is closed", hint="load the bundle again")


def to_numpy(tensor: Tensor) -> Array:
    """The tensor as an array on the host. Only a tensor on a device is copied."""
    return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()


def samples(tensor: Tensor) -> list[Tensor]:
    """The tensor's entries along its first dimension, each of shape (1, ...), without a copy."""
    return [narrow(tensor, i, i + 1) for i in range(tensor.shape[0])]


def narrow(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The entries from start up to stop of the first dimension, without a copy."""
    return tensor[start:stop] if isinstance(tensor, np.ndarray) else tensor.narrow(start, stop)


def assign(target: Tensor, start: int, source: Tensor) -> None:
    """Copy the source over the entries of the target from `start` on."""
    if isinstance(target, np.ndarray):
        target[start : start + source.shape[0]] = to_numpy(source)
    else:
        target.assign(start, source)


def check_fits(dtype: object, shape: Sequence[int], wanted: object, target: Sequence[int]) -> None:
    """Raise SessionError if entries of this type and shape cannot be copied into a tensor of the wanted ones."""
    if dtype != wanted or tuple(shape[1:]) != tuple(target[1:]):
        raise SessionError(
            f"entries {tuple(shape[1:])} of type {dtype} do not fit into a tensor with entries {tuple(target[1:])} of "
            f"type {wanted}",
            hint="keep the element types and shapes of the states that the pipeline makes",
        )


def empty_like(tensor: Tensor, length: int, name: str, session: Session) -> Tensor:
    """A tensor with undefined content for an input of the session, in the memory that the session reads.

    Args:
        tensor: an example; the result has its shape, but for the first dimension, which is `length`.
        name: the name of the input.
    """
    shape = (length, *tensor.shape[1:])
    if isinstance(session, DeviceSession):
        return session.empty(shape, session.spec.input(name).dtype)
    return np.empty(shape, to_numpy(tensor).dtype)


def concatenate(parts: Sequence[Tensor], name: str, session: Session) -> Tensor:
    """Join parts of an input along the first dimension, in the memory that the session reads."""
    if not isinstance(session, DeviceSession):
        return np.concatenate([to_numpy(part) for part in parts])
    whole, start = empty_like(parts[0], sum(part.shape[0] for part in parts), name, session), 0
    for part in parts:
        assign(whole, start, part)
        start += part.shape[0]
    return whole


_NUMPY = {DType.BFLOAT16: np.dtype(np.uint16), DType.BOOL: np.dtype(np.bool_)}


def numpy_dtype(dtype: DType) -> np.dtype[np.generic]:
    """The numpy type of a tensor on the host. numpy has no bf16; such a tensor is a uint16 array of its bits."""
    return _NUMPY.get(dtype) or np.dtype(dtype.value)


def zeros(shape: tuple[int, ...], dtype: DType) -> Array:
    """An array of zeros on the host, in an element type of a stage."""
    return np.zeros(shape, numpy_dtype(dtype))
