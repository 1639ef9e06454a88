"""Sessions that note how long each run took, and the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, runtime_checkable

from ditc.runtime.session import (
    Array,
    ComputeDevice,
    DeviceSession,
    DeviceTensor,
    LoopSession,
    Session,
    Tensor,
    to_numpy,
)
from ditc.runtime.spec import DType, StageSpec
from ditc.runtime.step_contract import STATS

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a stage, or one step of a launch of several: its time, and the shapes of its inputs."""

    seconds: float
    shapes: Shapes


@runtime_checkable
class EngineSession(Session, LoopSession, DeviceSession, Protocol):
    """What the session of an engine promises."""


def timed(session: Session) -> TimedSession:
    """The session with a clock. It promises what the session promises."""
    return TimedEngineSession(session) if isinstance(session, EngineSession) else TimedSession(session)


class TimedSession:
    """A session with a clock. A run ends when its results are there: on a device, one of them is read."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.runs: list[Run] = []

    @property
    def spec(self) -> StageSpec:
        return self.session.spec

    @property
    def device(self) -> ComputeDevice:
        return self.session.device

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the session does."""
        begin = perf_counter()
        outputs = self.session.run(feeds)
        _wait(outputs)
        self.runs.append(Run(perf_counter() - begin, _shapes(feeds)))
        return outputs

    def close(self) -> None:
        """As the session does."""
        self.session.close()


class TimedEngineSession(TimedSession):
    """The same for a session that can run several steps in one launch, with its tensors on a device."""

    def __init__(self, session: EngineSession) -> None:
        super().__init__(session)
        self._engine = session

    def run_loop(
        self,
        feeds: Mapping[str, Tensor],
        per_step: Sequence[Mapping[str, Array]],
        *,
        carry: Mapping[str, str],
        keep: Collection[str],
    ) -> dict[str, Tensor]:
        """As the session does. Each step counts with an equal share of the launch."""
        begin = perf_counter()
        outputs = self._engine.run_loop(feeds, per_step, carry=carry, keep=keep)
        _wait(outputs)
        each = (perf_counter() - begin) / len(per_step)
        self.runs += [Run(each, _shapes({**feeds, **step})) for step in per_step]
        return outputs

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceTensor:
        """As the session does."""
        return self._engine.empty(shape, dtype)


def _shapes(feeds: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in feeds.items()}


def _wait(outputs: Mapping[str, Tensor]) -> None:
    """Wait until a device has made the results. The loop reads the statistics of a step soon anyway."""
    tensor = outputs.get(STATS)
    if tensor is None:
        tensor = min(outputs.values(), key=lambda each: each.shape)
    to_numpy(tensor)
