"""The front of `ditc serve --ray`: the process that answers HTTP. It reaches Ray, and the pool with its replicas.

The supervisor starts it, and tells it of the cluster and the socket that it has made; see place.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import sleep
from types import TracebackType
from typing import Self

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cores import default_threads
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.serving.memory import default_budget, gpu_bytes
from ditc.runtime.serving.replicas.options import ReplicaOptions, replica_options
from ditc.runtime.serving.replicas.place import place
from ditc.runtime.serving.settings import SchedulerOptions

# How long a front waits for the first node of an existing cluster that can hold a replica.
NODE_SECONDS = 60.0


def options_of(arguments: argparse.Namespace, load: LoadOptions) -> ReplicaOptions:
    """The operator's choices. Without --threads, the replicas share the cores of this machine."""
    most = arguments.max_replicas or arguments.min_replicas or 1
    return replica_options(arguments, load.threads or max(1, default_threads() // max(1, most)))


class Front:
    """What the front has besides the HTTP application. Inside the `with` block, replicas are kept alive.

    Args:
        bundles: the path of each bundle, by its name.

    Raises:
        DitcError: a manifest cannot be read, or no node can hold a replica.
    """

    def __init__(self, arguments: argparse.Namespace, load: LoadOptions, bundles: Mapping[str, Path]) -> None:
        from ditc.runtime.serving.replicas.cluster import RayCluster
        from ditc.runtime.serving.replicas.opener import ReplicaOpener
        from ditc.runtime.serving.replicas.pool import Pool

        here = place()
        assert here is not None
        for path in bundles.values():
            load_manifest(path)
        self._options = options_of(arguments, load)
        self._gpu_bytes = gpu_bytes(bundles, load) if self._options.gpus != 0 else None
        if self._options.gpus is None:
            self._options = replace(self._options, gpus=0.0 if self._gpu_bytes is None else 1.0)
        gpus = self._options.gpus or 0.0
        cluster = RayCluster(here.namespace, self._options, gpus=gpus, address=here.address)
        cluster.check_room(patience=NODE_SECONDS if os.environ.get("RAY_ADDRESS") else 0.0)
        self._socket, self._supervisor = here.socket, here.supervisor
        self._pool = Pool(cluster, self._options)
        self.opener = ReplicaOpener(
            self._pool,
            load=replace(load, threads=self._options.cpus),
            scheduled=SchedulerOptions(
                max_batch=arguments.max_batch, window=arguments.batch_window_ms / 1000
            ),
            warm_up_seconds=arguments.warm_up_seconds,
        )

    def __enter__(self) -> Self:
        threading.Thread(target=_end_without_supervisor, args=(self._supervisor,), daemon=True).start()
        self._pool.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.stop()

    def listener(self) -> socket.socket:
        """The socket that the supervisor keeps open, so that connections wait while the front is started again."""
        return socket.socket(fileno=self._socket)

    def default_budget(self) -> int | None:
        """The memory that the models of one replica may take, if this machine holds all of them."""
        whole = default_budget(self._gpu_bytes)
        share = 1 / self._options.most if self._gpu_bytes is None else min(1.0, self._options.gpus or 1.0)
        return None if whole is None else int(whole * share)


def _end_without_supervisor(supervisor: int) -> None:
    while os.getppid() == supervisor:
        sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
