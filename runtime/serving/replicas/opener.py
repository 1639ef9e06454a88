"""Opens bundles in replicas, for `Models`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import DitcError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.serving.model import Model, expected_bytes
from ditc.runtime.serving.replicas.described import described_pipeline
from ditc.runtime.serving.replicas.handle import Bundle
from ditc.runtime.serving.replicas.messages import Version
from ditc.runtime.serving.replicas.pool import Pool
from ditc.runtime.serving.replicas.remote_scheduler import RemoteScheduler
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.scheduling.observer import Observer
from ditc.runtime.serving.settings import SchedulerOptions


class ReplicaOpener:
    """Opens a version of a bundle in all replicas of a pool, and describes it here."""

    def __init__(
        self, pool: Pool, *, load: LoadOptions, scheduled: SchedulerOptions, warm_up_seconds: float
    ) -> None:
        self._pool, self._load = pool, load
        self._scheduled, self._warm_up_seconds = scheduled, warm_up_seconds

    def expected_bytes(self, bundle: Path) -> int:
        """The memory that a replica takes at least; 0 if this machine, unlike the replicas', cannot run the bundle."""
        load_manifest(bundle)
        try:
            return expected_bytes(bundle, self._load)
        except DitcError:
            return 0

    def open(
        self,
        name: str,
        bundle: Path,
        *,
        admission: Admission,
        observer: Observer,
        lora: LoraChoice | None = None,
    ) -> Model:
        """Open a bundle in the replicas. Raises DitcError as `open_model`."""
        manifest = load_manifest(bundle)
        version = Version(name, manifest.digest)
        path = str(bundle.absolute())
        asked = Bundle(
            path=path,
            load=self._load,
            scheduled=self._scheduled,
            warm_up_seconds=self._warm_up_seconds,
            lora=None if lora is None else replace(lora, file=lora.file.absolute()),
        )
        opened = self._pool.open_version(version, asked)
        try:
            pipeline = described_pipeline(bundle, manifest, opened)
            scheduler = RemoteScheduler(
                self._pool, version, pipeline, opened, admission=admission, observer=observer
            )
        except BaseException:
            self._pool.close_version(version)
            raise
        self._pool.register(scheduler)
        return Model(name=name, scheduler=scheduler, size_bytes=opened.size_bytes)
