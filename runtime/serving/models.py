"""The bundles that a server serves, by name: opened, warmed up, and kept as long as somebody draws with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ditc.runtime.load_options import DEFAULTS, LoadOptions
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.serving.admission import Admission
from ditc.runtime.serving.job import Event, Job
from ditc.runtime.serving.observer import UNOBSERVED, Observer
from ditc.runtime.serving.refusals import Invalid
from ditc.runtime.serving.scheduler import DEFAULTS as SCHEDULED
from ditc.runtime.serving.scheduler import Scheduler, SchedulerOptions
from ditc.runtime.serving.warm_up import warm_up


@dataclass(frozen=True, kw_only=True)
class Model:
    """One opened version of a bundle. Requests that began with it end with it."""

    name: str
    scheduler: Scheduler

    @property
    def pipeline(self) -> Pipeline:
        return self.scheduler.pipeline

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
        plan = self.pipeline.plan(request)
        return self.scheduler.submit(plan, listener, id=id, timeout=timeout, previews=previews)


class Models:
    """Opens bundles when they are first asked for. Threads can share it.

    Args:
        bundles: the path of each bundle, by the name under which it is served. The first is the default.
    """

    def __init__(
        self,
        bundles: Mapping[str, Path],
        *,
        admission: Admission,
        load: LoadOptions = DEFAULTS,
        scheduled: SchedulerOptions = SCHEDULED,
        observer: Observer = UNOBSERVED,
        warm_up_seconds: float = 30.0,
    ) -> None:
        self.bundles = dict(bundles)
        self.admission = admission
        self._load, self._scheduled, self._observer = load, scheduled, observer
        self._warm_up_seconds = warm_up_seconds
        self._open: dict[str, Model] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.bundles)

    @contextmanager
    def using(self, name: str | None = None) -> Iterator[Model]:
        """The model of this name, which stays open inside the block. Opening it may take minutes.

        Args:
            name: None takes the default.

        Raises:
            Refusal: no bundle is served under this name (404).
        """
        name = self.names[0] if name is None else name
        if name not in self.bundles:
            raise Invalid(
                f"the model {name!r:.80} does not exist",
                hint=f"this server has {', '.join(self.names)}",
                param="model",
                status=404,
                code="model_not_found",
            )
        with self._lock:
            if name not in self._open:
                self._open[name] = self._opened(name)
        yield self._open[name]

    def problems(self) -> dict[str, str]:
        """Why models cannot draw at the moment, by name, in words for clients. Empty if the server is ready."""
        if not self._open:
            return {self.names[0]: "it is being loaded"}
        return {name: why for name, model in self._open.items() if (why := model.scheduler.problem)}

    def opened(self, name: str) -> Model | None:
        """The model of this name if it is open. It may be closed at any time, so it is only good for looking at."""
        return self._open.get(name)

    def close(self) -> None:
        """Close all models."""
        for model in self._open.values():
            model.scheduler.close()
        self._open.clear()

    def _opened(self, name: str) -> Model:
        def load() -> Pipeline:
            return Pipeline.load(self.bundles[name], options=self._load)

        scheduler = Scheduler(
            load(),
            admission=self.admission,
            reopen=load,
            options=self._scheduled,
            observer=self._observer,
        )
        warm_up(scheduler.pipeline, scheduler.times, seconds=self._warm_up_seconds)
        scheduler.start()
        return Model(name=name, scheduler=scheduler)
