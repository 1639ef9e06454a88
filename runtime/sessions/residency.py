"""Load, use, unload: one stage in GPU memory at a time, for GPUs that do not hold all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

from ditc.runtime.session import (
    Array,
    ComputeDevice,
    DeviceSession,
    DeviceTensor,
    LoopSession,
    Session,
    Tensor,
)
from ditc.runtime.spec import DType, StageSpec


class Residency:
    """Which stage is loaded. Using another one unloads it first."""

    def __init__(self) -> None:
        self._loaded: OnDemandSession | None = None

    def enter(self, session: OnDemandSession) -> None:
        """Make room for a stage."""
        if self._loaded is not None and self._loaded is not session:
            self._loaded.unload()
        self._loaded = session


class OnDemandSession:
    """A session that is opened when it is used; the denoiser stays for its whole loop, since nothing comes between.

    Args:
        open_inner: opens the stage. device: of the session that it will open.
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

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the inner session; opens it first."""
        return self._ready().run(feeds)

    def run_loop(
        self,
        feeds: Mapping[str, Tensor],
        per_step: Sequence[Mapping[str, Array]],
        *,
        carry: Mapping[str, str],
        keep: Collection[str],
    ) -> dict[str, Tensor]:
        """As the inner session, which must be one that loops."""
        return cast(LoopSession, self._ready()).run_loop(feeds, per_step, carry=carry, keep=keep)

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceTensor:
        """As the inner session, which must be one on a device."""
        return cast(DeviceSession, self._ready()).empty(shape, dtype)

    def unload(self) -> None:
        """Close the inner session; the next use opens it again."""
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.close()

    def close(self) -> None:
        """Release everything."""
        self.unload()

    def _ready(self) -> Session:
        self._residency.enter(self)
        if self._inner is None:
            self._inner = self._open()
        return self._inner
