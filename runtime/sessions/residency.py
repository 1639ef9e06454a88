"""Keeps only one stage in GPU memory, for GPUs that cannot hold all of them. Each stage is loaded when it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from ditc.runtime.session import (
    Array,
    ComputeDevice,
    DeviceSession,
    DeviceTensor,
    LoopSession,
    Session,
    Tensor,
    closed,
)
from ditc.runtime.spec import DType, StageSpec


class Residency:
    """Keeps track of the stage that is loaded, and unloads it before another one is used.

    Threads take turns: a stage is never unloaded while another thread runs it. Threads that want different stages are
    served correctly but slowly, because the stages then replace each other all the time.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._loaded: OnDemandSession | None = None

    def enter(self, session: OnDemandSession) -> None:
        """Unload the loaded stage, unless it is this one. The caller holds the lock, and loads this one next."""
        if self._loaded is not None and self._loaded is not session:
            self._loaded.unload()
        self._loaded = session


class OnDemandSession:
    """A session that is opened when it is used. The denoiser stays open during its loop, when no other stage runs.

    Args:
        open_inner: opens the session of the stage.
        device: the device of that session.
    """

    def __init__(
        self,
        spec: StageSpec,
        open_inner: Callable[[], Session],
        residency: Residency,
        *,
        device: ComputeDevice,
    ) -> None:
        self.spec = spec
        self.device = device
        self._open, self._residency = open_inner, residency
        self._inner: Session | None = None
        self._closed = False

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the stage. Opens the session first if it is not open."""
        with self._ready() as inner:
            return inner.run(feeds)

    def run_loop(
        self,
        feeds: Mapping[str, Tensor],
        per_step: Sequence[Mapping[str, Array]],
        *,
        carry: Mapping[str, str],
        keep: Collection[str],
    ) -> dict[str, Tensor]:
        """Run a loop. The inner session must be a LoopSession."""
        with self._ready() as inner:
            return cast(LoopSession, inner).run_loop(feeds, per_step, carry=carry, keep=keep)

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceTensor:
        """Make a tensor. The inner session must be a DeviceSession."""
        with self._ready() as inner:
            return cast(DeviceSession, inner).empty(shape, dtype)

    def unload(self) -> None:
        """Close the inner session. The next use opens it again."""
        with self._residency.lock:
            inner, self._inner = self._inner, None
            if inner is not None:
                inner.close()

    def close(self) -> None:
        """Release everything."""
        with self._residency.lock:
            self._closed = True
            self.unload()

    @contextmanager
    def _ready(self) -> Iterator[Session]:
        """The open session, which no other thread can unload inside the block."""
        with self._residency.lock:
            if self._closed:
                raise closed(self.spec)
            self._residency.enter(self)
            if self._inner is None:
                self._inner = self._open()
            yield self._inner
