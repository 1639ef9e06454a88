"""How the front reaches replicas: what `cluster.py` does with Ray, and tests without it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from ditc.runtime.load_options import LoadOptions
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.serving.replicas.messages import Message, Opened, Version
from ditc.runtime.serving.settings import SchedulerOptions


class ReplicaLost(Exception):
    """The replica's process has ended, or its node cannot be reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What a replica needs to open a version of a bundle.

    Attributes:
        path: of the bundle on the front's machine. A node that does not have it there gets it from the front.
        lora: is added to its weights; its file has the same path on every node.
    """

    path: str
    load: LoadOptions
    scheduled: SchedulerOptions
    warm_up_seconds: float
    lora: LoraChoice | None = None


class Handle(Protocol):
    """One replica. Its methods are those of `Replica`; all raise ReplicaLost if it is gone."""

    @property
    def name(self) -> str: ...

    async def begin(self) -> Message:
        """What `Replica.begin` tells, with the node on which the replica is."""
        ...

    async def pin(self, cpus: Collection[int]) -> None: ...

    async def open(self, version: Version, bundle: Bundle) -> Opened:
        """Open a version. Raises DitcError if it cannot be opened."""
        ...

    async def close(self, version: Version) -> None: ...

    async def cancel(self, id: str) -> None: ...

    async def health(self) -> Message: ...

    def draw(self, asked: Message) -> AsyncIterator[Message]: ...

    async def taken(self, id: str) -> None:
        """Tell that a message of pixels was taken, so that `draw` of this request may send another one."""
        ...


class Cluster(Protocol):
    """Starts and ends replicas."""

    def spawn(self) -> Handle:
        """Start a replica. It may have to wait for a place; then its `begin` takes as long."""
        ...

    def existing(self) -> Sequence[Handle]:
        """The replicas that an earlier front has left."""
        ...

    def kill(self, handle: Handle, told: Message) -> None:
        """End a replica's process at once, also one that is stopped.

        Args:
            told: what its `begin` returned; {} if it has not answered.
        """
        ...
