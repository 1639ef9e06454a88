"""One opened version of a bundle: loaded, tested on its golden inputs, and run until its times are known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Protocol

from ditc.runtime.bundle.bench_record import Measured, find_entry
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.bundle.selftest import describe, run_self_test
from ditc.runtime.cores import default_threads
from ditc.runtime.errors import DitcError, NumericsError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose_here
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.shared import Matrices
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan, make_plan
from ditc.runtime.request import Request
from ditc.runtime.serving.memory import resident_bytes
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.scheduling.interface import Schedules
from ditc.runtime.serving.scheduling.job import Event, Job
from ditc.runtime.serving.scheduling.observer import Observer
from ditc.runtime.serving.scheduling.scheduler import Scheduler
from ditc.runtime.serving.scheduling.variant import Variant
from ditc.runtime.serving.scheduling.warm_up import begin_with, warm_up
from ditc.runtime.serving.settings import SchedulerOptions
from ditc.runtime.spec import Precision

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Model:
    """One opened version of a bundle. Requests that began with it end with it.

    Attributes:
        size_bytes: the memory that it takes.
        users: how many requests hold it, for `Models`, which closes it when it has been replaced and there are none.
        variants: by name, the models that share its sessions and draw with a LoRA.
    """

    name: str
    scheduler: Schedules
    size_bytes: int
    users: int = 0
    variants: Mapping[str, Variant] = field(default_factory=dict)

    def under(self, name: str) -> Model | None:
        """The model itself, or the one of its variants with this name; None if that one's LoRA could not be read."""
        variant = self.variants.get(name)
        if variant is None:
            return self if name == self.name else None
        return None if variant.is_lost else Model(name=name, scheduler=variant, size_bytes=0)

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline at this moment. After a session has failed, it is another one."""
        return self.scheduler.pipeline

    @property
    def digest(self) -> str:
        """The digest of the bundle's manifest, which names the version."""
        return self.pipeline.manifest.digest

    def plan(self, request: Request) -> Plan:
        """Fill in the defaults of a request, and check it. This needs no open session, so it works after a crash.

        Raises:
            UsageError: the bundle cannot draw this.
        """
        return make_plan(request, self.pipeline.drawable)

    def submit(
        self,
        request: Request,
        listener: Callable[[Event], None],
        *,
        id: str,
        timeout: float | None = None,
        previews: int = 0,
    ) -> Job:
        """Check a request, and accept it or refuse it.

        Raises:
            UsageError: the bundle cannot draw this.
            Refusal: as `Scheduler.submit`.
        """
        return self.scheduler.submit(self.plan(request), listener, id=id, timeout=timeout, previews=previews)


class Opener(Protocol):
    """Opens versions of bundles: in this process, or in replicas."""

    def expected_bytes(self, bundle: Path) -> int:
        """The memory that a bundle takes at least. Raises DitcError if it cannot be opened."""
        ...

    def open(
        self,
        name: str,
        bundle: Path,
        *,
        admission: Admission,
        observer: Observer,
        lora: LoraChoice | None = None,
    ) -> Model:
        """Open a bundle. Raises DitcError if it cannot be opened."""
        ...


class LocalOpener:
    """Opens bundles in this process.

    Args:
        warm_up_seconds: as in `warm_up`.
        shared: by the names of models, the name of another model, and the LoRA that this gets as an input.
    """

    def __init__(
        self,
        load: LoadOptions,
        scheduled: SchedulerOptions,
        warm_up_seconds: float,
        shared: Mapping[str, tuple[str, LoraChoice]],
    ) -> None:
        self._load, self._scheduled, self._warm_up_seconds = load, scheduled, warm_up_seconds
        self._shared = shared

    def expected_bytes(self, bundle: Path) -> int:
        """See Opener."""
        return expected_bytes(bundle, self._load)

    def open(
        self,
        name: str,
        bundle: Path,
        *,
        admission: Admission,
        observer: Observer,
        lora: LoraChoice | None = None,
    ) -> Model:
        """See Opener."""
        return open_model(
            name,
            bundle,
            load=self._load,
            admission=admission,
            scheduled=self._scheduled,
            observer=observer,
            warm_up_seconds=self._warm_up_seconds,
            lora=lora,
            shared={variant: choice for variant, (base, choice) in self._shared.items() if base == name},
        )


def open_model(
    name: str,
    bundle: Path,
    *,
    load: LoadOptions,
    admission: Admission,
    scheduled: SchedulerOptions,
    observer: Observer,
    warm_up_seconds: float,
    lora: LoraChoice | None = None,
    shared: Mapping[str, LoraChoice] | None = None,
) -> Model:
    """Open a bundle, test it and warm it up. It takes seconds to minutes.

    Args:
        lora: is added to the weights, after the test of the bundle's own.
        shared: by the names of variants, LoRAs that are inputs of the graphs. One that cannot be read is left out.

    Raises:
        DitcError: as `Pipeline.load`; or the self-test failed.
    """
    began, before, matrices = monotonic(), resident_bytes(), Matrices(scheduled.max_loras)
    scheduler = Scheduler(
        open_pipeline(bundle, load, lora),
        admission=admission,
        reopen=lambda: open_pipeline(bundle, load, lora),
        options=scheduled,
        observer=observer,
        variants=lambda pipeline: pipelines_with_loras(pipeline, shared or {}, matrices),
    )
    try:
        begin_with(scheduler.pipeline, scheduler.times, recorded_times(bundle, scheduler.pipeline, load))
        warm_up(scheduler.pipeline, scheduler.times, seconds=warm_up_seconds)
        scheduler.start()
    except BaseException:
        scheduler.close()
        raise
    pipeline = scheduler.pipeline
    if pipeline.uncertified:
        log.warning("%s is not certified: %s", name, pipeline.uncertified)
    device = pipeline.device
    measured = device.measure() if device is not None else resident_bytes() - before
    log.info("%s is ready after %.1f s, version %.12s", name, monotonic() - began, pipeline.manifest.digest)
    return Model(
        name=name,
        scheduler=scheduler,
        size_bytes=max(expected_bytes(bundle, load) + matrices.size_bytes, measured),
        variants={variant: Variant(scheduler, variant) for variant in shared or {}},
    )


def pipelines_with_loras(
    pipeline: Pipeline, loras: Mapping[str, LoraChoice], matrices: Matrices
) -> dict[str, Pipeline]:
    """A pipeline for each LoRA, which shares the given one's sessions. LoRAs that cannot be read are left out."""
    found = {}
    for name, choice in loras.items():
        try:
            found[name] = pipeline.with_loras([choice], matrices=matrices)
        except DitcError as e:  # the others are drawn all the same
            log.error("%s cannot be drawn: %s", name, e)
    return found


def open_pipeline(bundle: Path, load: LoadOptions, lora: LoraChoice | None = None) -> Pipeline:
    """Load a bundle and run every stage on its golden inputs, at every load, unless the options say not to.

    A LoRA is added to the weights after that.

    Raises:
        DitcError: as `Pipeline.load`.
        NumericsError: a stage does not compute what it computed in PyTorch.
    """
    pipeline = Pipeline.load(bundle, options=load)
    try:
        if load.self_test:
            _test(bundle, pipeline, load)
        pipeline.load_loras([] if lora is None else [lora])
    except BaseException:
        pipeline.close()
        raise
    return pipeline


def _test(bundle: Path, pipeline: Pipeline, load: LoadOptions) -> None:
    """Raise NumericsError if a stage does not compute what it computed in PyTorch."""
    artifacts, _ = choose_here(bundle, pipeline.manifest, load)
    tested = run_self_test(bundle, pipeline.manifest, pipeline.sessions, artifacts)
    if broken := next((line for line in tested.lines if line.passed is False), None):
        raise NumericsError(
            f"the self-test failed: {describe(broken)}",
            hint="build the bundle again, or serve it anyway with --no-self-test",
        )


def recorded_times(bundle: Path, pipeline: Pipeline, load: LoadOptions) -> Measured | None:
    """What `ditc bench --record` measured of what was loaded, on a machine of this kind; None without that."""
    entry = find_entry(bundle, pipeline.manifest, load.threads or default_threads())
    return None if entry is None else entry.candidate(pipeline.backend, Precision(pipeline.precision))


def expected_bytes(bundle: Path, load: LoadOptions) -> int:
    """The memory that a bundle takes at least, from its manifest: the files that are opened.

    Raises:
        DitcError: the manifest cannot be read, or no artifact fits the machine and the options.
    """
    artifacts, _ = choose_here(bundle, load_manifest(bundle), load)
    return sum(file.size_bytes for artifact in artifacts.values() for file in artifact.files)
