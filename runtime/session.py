"""What the pipeline knows of a backend: a Session runs one stage, and exchanges opaque tensors.

A session holds no request state, so one session serves any number of interleaved requests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.spec import SIXTEEN_BITS, DType, Precision, StageSpec

Array = NDArray[Any]


@runtime_checkable
class DeviceTensor(Protocol):
    """A buffer that lives on a device. `numpy()` copies it to the host."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def numpy(self) -> Array: ...

    def narrow(self, start: int, stop: int) -> DeviceTensor:
        """The entries start to stop of the first dimension, in the same memory."""
        ...

    def assign(self, start: int, source: Tensor) -> None:
        """Copy the source over the entries from `start` on. Only who made the buffer may write to it."""
        ...


Tensor = Array | DeviceTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeDevice:
    """Where a session computes, and what follows from it for those who judge its results.

    Attributes:
        kind: of processor; "other" is one that only a reference in PyTorch may use.
        name: what computes there, for messages: "ONNX Runtime's CPU provider".
        native_16_bits: 16-bit stages are computed in 16 bits. Where they are not, their rounding does not show.
        tried_at_build: every build runs its graphs on such a device, so that a first use needs no self-test. Elsewhere
            kernels differ by processor and driver, and each machine shows its own.
    """

    kind: Literal["cpu", "cuda", "other"]
    name: str
    native_16_bits: bool = True
    tried_at_build: bool = False

    def widens(self, precision: Precision) -> bool:
        """Whether a stage of this precision is computed in a wider type here."""
        return precision in SIXTEEN_BITS and not self.native_16_bits


class Session(Protocol):
    """Runs one stage. Feeds are named as in `spec.inputs`, results as in `spec.outputs`."""

    @property
    def spec(self) -> StageSpec: ...

    @property
    def device(self) -> ComputeDevice: ...

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Execute the stage once.

        Raises:
            SessionError: a feed is missing, or its type or shape is outside the spec.
        """
        ...

    def close(self) -> None:
        """Release everything that the session owns. Idempotent."""
        ...


@runtime_checkable
class LoopSession(Protocol):
    """A session that can run several times in one launch and feed its outputs back, without the host between."""

    def run_loop(
        self,
        feeds: Mapping[str, Tensor],
        per_step: Sequence[Mapping[str, Array]],
        *,
        carry: Mapping[str, str],
        keep: Collection[str],
    ) -> dict[str, Tensor]:
        """Run once for each entry of per_step.

        Args:
            feeds: the inputs that are constant, and the first values of those that are carried.
            per_step: the other inputs, by step.
            carry: output -> the input that it is in the next step.
            keep: outputs wanted of every step: they come back with a first dimension more, one entry a step.

        Returns:
            All outputs, as the last step left them but for `keep`.

        Raises:
            SessionError: as `run`.
        """
        ...


@runtime_checkable
class DeviceSession(Protocol):
    """A session whose tensors live on a device, and that makes such tensors for whoever stacks its inputs."""

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceTensor:
        """A tensor with undefined content, for `assign`. Raises SessionError when there is no memory."""
        ...


def to_numpy(tensor: Tensor) -> Array:
    """The tensor on the host: itself if it is an array, else a copy."""
    return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()


def samples(tensor: Tensor) -> list[Tensor]:
    """The tensor's entries along its first dimension, each (1, ...), left where they are."""
    return [narrow(tensor, i, i + 1) for i in range(tensor.shape[0])]


def narrow(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The entries start to stop of the first dimension, left where they are."""
    return tensor[start:stop] if isinstance(tensor, np.ndarray) else tensor.narrow(start, stop)


def assign(target: Tensor, start: int, source: Tensor) -> None:
    """Copy the source over the target's entries from `start` on."""
    if isinstance(target, np.ndarray):
        target[start : start + source.shape[0]] = to_numpy(source)
    else:
        target.assign(start, source)


def empty_like(tensor: Tensor, length: int, name: str, session: Session) -> Tensor:
    """A tensor with undefined content for `length` entries of an input of the session, where the session reads it."""
    shape = (length, *tensor.shape[1:])
    if isinstance(session, DeviceSession):
        return session.empty(shape, session.spec.input(name).dtype)
    return np.empty(shape, to_numpy(tensor).dtype)


def concatenate(parts: Sequence[Tensor], name: str, session: Session) -> Tensor:
    """Parts of an input along the first dimension, copied to where the session reads them."""
    if not isinstance(session, DeviceSession):
        return np.concatenate([to_numpy(part) for part in parts])
    whole, start = empty_like(parts[0], sum(part.shape[0] for part in parts), name, session), 0
    for part in parts:
        assign(whole, start, part)
        start += part.shape[0]
    return whole


_NUMPY = {DType.BFLOAT16: np.dtype(np.uint16), DType.BOOL: np.dtype(np.bool_)}


def numpy_dtype(dtype: DType) -> np.dtype[np.generic]:
    """The numpy type that carries a stage tensor on the host; bf16 travels as its bits."""
    return _NUMPY.get(dtype) or np.dtype(dtype.value)


def zeros(shape: tuple[int, ...], dtype: DType) -> Array:
    """A host tensor of zeros in a stage's element type."""
    return np.zeros(shape, numpy_dtype(dtype))
