"""Replicas as actors of Ray: detached, so that they outlive the front, and never restarted by Ray itself.

This is the only file that Ray is imported in. Actors get plain values; the front alone decides what runs where.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from ditc.runtime.errors import BundleError, DitcError, MissingExtra, UsageError
from ditc.runtime.serving.replicas.handle import Bundle, Handle, ReplicaLost
from ditc.runtime.serving.replicas.messages import Message, Opened, Version
from ditc.runtime.serving.replicas.node_bundles import read_part
from ditc.runtime.serving.replicas.options import ReplicaOptions
from ditc.runtime.serving.replicas.replica import Replica

log = logging.getLogger(__name__)

# Shared memory for pictures on their way to the front; Ray's default is 30 % of the machine's.
OBJECT_STORE_BYTES = 256 * 1024**2
# Calls that one replica answers at a time.
_CALLS = 4096
# How long a replica has to end when Ray tells it to.
_OWN_END_SECONDS = 1.0
_STOP_SECONDS = 15.0
# How long a part of a bundle's file may take from the front's node.
_READ_SECONDS = 60.0


def start_ray(options: ReplicaOptions) -> str:
    """Start a Ray on this machine, or reach the cluster that RAY_ADDRESS names. Returns the address for the front.

    A Ray that is started here asks for a token, has no dashboard, and is told to use loopback.

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = _ray()
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        else:
            ray.init(
                address="local",  # else Ray joins another one that it finds on this machine
                num_cpus=options.cpus * options.most,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _node_ip_address="127.0.0.1",
            )
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise UsageError(
            f"Ray cannot be used: {str(e).splitlines()[0]:.300}",
            hint="set RAY_ADDRESS to the address of a cluster, or unset it to start a Ray here",
        ) from e
    return str(ray.get_runtime_context().gcs_address)


def stop_ray(namespace: str) -> None:
    """End all replicas of a server, and the Ray that `start_ray` started. It waits for neither for long.

    The front has ended the replicas, unless it was killed. Ray itself may be gone, and calls then wait for a minute.
    """

    def stop() -> None:
        ray = _ray()
        with suppress(Exception):
            for handle in RayCluster(namespace, ReplicaOptions()).existing():
                ray.kill(handle.actor)
        ray.shutdown()

    stopping = threading.Thread(target=stop, daemon=True)
    stopping.start()
    stopping.join(_STOP_SECONDS)


class RayCluster:
    """The replicas of one server.

    Args:
        namespace: of the names of its actors.
        gpus: what Ray reserves for each replica.
        address: of the cluster; None if this process has reached it.
    """

    def __init__(
        self, namespace: str, options: ReplicaOptions, *, gpus: float = 0.0, address: str | None = None
    ) -> None:
        self._ray = _ray()
        if address is not None:
            self._ray.init(
                address=address, namespace=namespace, log_to_driver=False, logging_level=logging.WARNING
            )
        self._namespace, self._options, self._gpus = namespace, options, gpus
        self._here = self._ray.get_runtime_context().get_node_id()

    def check_room(self, *, patience: float = 0.0) -> None:
        """Raise UsageError if no node could hold a replica.

        Args:
            patience: for how many seconds to wait for one, because the nodes of a cluster start one after the other.
        """
        wanted = {"CPU": self._options.cpus, "GPU": self._gpus}
        missing = f"no node has the {self._options.cpus} CPUs and {self._gpus:g} GPUs of a replica"
        end, told = monotonic() + patience, False
        while not any(
            node["Alive"] and all(node["Resources"].get(n, 0) >= value for n, value in wanted.items())
            for node in self._ray.nodes()
        ):
            if monotonic() >= end:
                raise UsageError(missing, hint="choose fewer --threads or --gpus-per-replica, or add a node")
            if not told:
                log.info("%s yet: waiting for one for up to %.0f s", missing, patience)
            told = True
            sleep(0.5)

    def spawn(self) -> RayHandle:
        """See Cluster."""
        name = f"replica-{secrets.token_hex(4)}"
        actor = (
            self._ray.remote(Replica)
            .options(
                name=name,
                namespace=self._namespace,
                lifetime="detached",
                num_cpus=self._options.cpus,
                num_gpus=self._gpus,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=_CALLS,
            )
            .remote()
        )
        return RayHandle(name, actor, self._here)

    def existing(self) -> list[RayHandle]:
        """See Cluster."""
        found = []
        for one in self._ray.util.list_named_actors(all_namespaces=True):
            if one["namespace"] == self._namespace:
                with suppress(ValueError):  # it has ended
                    actor = self._ray.get_actor(one["name"], namespace=self._namespace)
                    found.append(RayHandle(one["name"], actor, self._here))
        return found

    def kill(self, handle: Handle, told: Message) -> None:
        """See Cluster. A stopped process does not hear Ray, so its node's kernel is asked later."""
        assert isinstance(handle, RayHandle)
        with suppress(Exception):
            self._ray.kill(handle.actor)
        if not told:
            return
        if told["node"] == self._here:
            _kill_process(told["pid"])
            return
        with suppress(Exception):
            _on_node(told["node"], _kill_process).remote(told["pid"])


@dataclass(frozen=True)
class NodeSource:
    """A bundle on another node, in whose tasks its files are read; see `Source`."""

    node: str
    bundle: str

    def read(self, path: str, offset: int) -> bytes | None:
        """See Source."""
        from ray.exceptions import RayError

        try:
            part: bytes | None = _ray().get(
                _on_node(self.node, read_part).remote(self.bundle, path, offset), timeout=_READ_SECONDS
            )
        except RayError as e:
            raise BundleError(
                f"{path} of {self.bundle} cannot be read on the front's node: {str(e).splitlines()[0]:.200}",
                hint="copy the bundle to all nodes, under the same path",
            ) from e
        return part


class RayHandle:
    """A replica that is an actor. Errors of Ray become ReplicaLost.

    Args:
        front: the node of this process, which has the bundles.
    """

    def __init__(self, name: str, actor: Any, front: str) -> None:
        self.name, self.actor, self._front = name, actor, front

    async def begin(self) -> Message:
        """See Handle."""
        told = await _answer(self.actor.begin.remote())
        return {**told, "node": await _answer(self.actor.__ray_call__.remote(_node_of))}

    async def pin(self, cpus: Collection[int]) -> None:
        """See Handle."""
        await _answer(self.actor.pin.remote(list(cpus)))

    async def open(self, version: Version, bundle: Bundle) -> Opened:
        """See Handle."""
        source = NodeSource(self._front, bundle.path)
        opened = await _answer(self.actor.open.remote(version, bundle, source))
        if isinstance(opened, dict):
            raise DitcError(opened["error"], hint=opened["hint"])
        result: Opened = opened
        return result

    async def close(self, version: Version) -> None:
        """See Handle."""
        await _answer(self.actor.close.remote(version))

    async def cancel(self, id: str) -> None:
        """See Handle."""
        await _answer(self.actor.cancel.remote(id))

    async def health(self) -> Message:
        """See Handle."""
        told: Message = await _answer(self.actor.health.remote())
        return told

    async def draw(self, asked: Message) -> AsyncIterator[Message]:
        """See Handle."""
        with _lost_if_gone():
            async for message in self.actor.draw.remote(asked):
                yield await message

    async def taken(self, id: str) -> None:
        """See Handle."""
        await _answer(self.actor.taken.remote(id))


async def _answer(reference: Awaitable[Any]) -> Any:
    with _lost_if_gone():
        return await reference


@contextmanager
def _lost_if_gone() -> Iterator[None]:
    """Ray's errors that are not of our own code mean that the replica, or what it sent, is gone."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError:
        raise
    except RayError as e:
        raise ReplicaLost(f"{type(e).__name__}: {str(e).splitlines()[0]:.200}") from e


def _on_node(node: str, function: Callable[..., Any]) -> Any:
    """A task of Ray that runs on this node and takes no CPUs."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return _ray().remote(function).options(num_cpus=0, scheduling_strategy=there, max_retries=0)


def _node_of(replica: object) -> str:
    return str(_ray().get_runtime_context().get_node_id())


def _kill_process(pid: int) -> None:
    """Kill a process that does not end by itself."""
    with suppress(ProcessLookupError):
        for _ in range(round(_OWN_END_SECONDS / 0.05)):
            os.kill(pid, 0)
            sleep(0.05)
        os.kill(pid, signal.SIGKILL)


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as e:
        raise MissingExtra("ray", "ray") from e
    return ray
