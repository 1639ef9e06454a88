"""Replicas in this process, for tests of the pool without Ray: they can be killed, and made to hang."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, replace
from typing import Any

from ditc.runtime.errors import DitcError
from ditc.runtime.serving.replicas.handle import Bundle, ReplicaLost
from ditc.runtime.serving.replicas.messages import Message, Opened, Version
from ditc.runtime.serving.replicas.node_bundles import read_part
from ditc.runtime.serving.replicas.replica import Replica


class FakeHandle:
    """A replica that shares the pool's event loop.

    Args:
        path: where its node looks for bundles; None where the front has them.
    """

    def __init__(self, name: str, path: str | None = None) -> None:
        self.name, self.replica, self.path = name, Replica(0), path
        self.dead = self.frozen = False
        self.begun: list[Message] = []
        self.sent: list[Message] = []
        self.stuck = 0.0

    async def _reach(self) -> None:
        if self.frozen:
            await asyncio.Event().wait()
        if self.dead:
            raise ReplicaLost("it was killed")

    async def begin(self) -> Message:
        await self._reach()
        return {**await self.replica.begin(), "node": "here"}

    async def pin(self, cpus: Collection[int]) -> None:
        await self._reach()

    async def open(self, version: Version, bundle: Bundle) -> Opened:
        await self._reach()
        path = bundle.path if self.path is None else self.path
        opened = await self.replica.open(version, replace(bundle, path=path), LocalSource(bundle.path))
        await self._reach()
        if isinstance(opened, dict):
            raise DitcError(opened["error"], hint=opened["hint"])
        return opened

    async def close(self, version: Version) -> None:
        await self._reach()
        await self.replica.close(version)

    async def cancel(self, id: str) -> None:
        await self._reach()
        await self.replica.cancel(id)

    async def health(self) -> Message:
        await self._reach()
        told = await self.replica.health()
        return {**told, "stuck": self.stuck or told["stuck"]}

    async def draw(self, asked: Message) -> AsyncIterator[Message]:
        self.begun.append(asked)
        await self._reach()
        async for message in self.replica.draw(asked):
            await self._reach()
            while self.stuck:  # what makes no progress has nothing to say either
                await asyncio.sleep(0.01)
                await self._reach()
            self.sent.append(message)
            yield message

    async def taken(self, id: str) -> None:
        await self._reach()
        await self.replica.taken(id)


@dataclass(frozen=True)
class LocalSource:
    """Reads a bundle as a task on the front's node would."""

    bundle: str

    def read(self, path: str, offset: int) -> bytes | None:
        return read_part(self.bundle, path, offset)


class FakeCluster:
    """Keeps all the handles that it has made.

    Args:
        path: as of FakeHandle, for all of them.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.handles: list[FakeHandle] = []
        self._numbers = itertools.count()

    @property
    def living(self) -> list[FakeHandle]:
        return [one for one in self.handles if not one.dead]

    def spawn(self) -> FakeHandle:
        self.handles.append(FakeHandle(f"replica-{next(self._numbers)}", self.path))
        return self.handles[-1]

    def existing(self) -> list[FakeHandle]:
        return self.living

    def kill(self, handle: Any, told: Message) -> None:
        handle.dead = True
