"""The bundles that a server serves, by name: opened when asked for, within a memory budget, and replaced in operation.

Requests hold the version of a bundle with which they began. A version that was replaced, or that others need the memory
of, is closed after its last request. The least recently used version goes first, and never one that is in use.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import DitcError
from ditc.runtime.load_options import DEFAULTS, LoadOptions
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.serving.model import LocalOpener, Model, Opener
from ditc.runtime.serving.refusals import Invalid, TooLate, Unavailable
from ditc.runtime.serving.room import Room
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.scheduling.observer import UNOBSERVED, Observer
from ditc.runtime.serving.scheduling.scheduler import DEFAULTS as SCHEDULED
from ditc.runtime.serving.settings import SchedulerOptions
from ditc.runtime.serving.slot import ModelState, Slot, state_of

log = logging.getLogger(__name__)

# Seconds after a failed load in which the bundle is not tried again, by the number of failures.
FAILURE_PAUSES = (5.0, 10.0, 30.0, 60.0)


class Models:
    """Opens bundles when they are first asked for. Threads can share it.

    Args:
        bundles: the path of each bundle, by the name under which it is served. The first is the default.
        observe: makes the observer of a model, by its name.
        budget: bytes that all models may take together; None sets no bound.
        awaited: names of the models without which the server is not ready.
        loras: by the names of models, the LoRA that each gets into its weights.
        shared: by the names of models, the LoRA that another one, which is named too, gets as an input. Such a model
            has no memory and no queue of its own.
        opener: opens bundles; None opens them in this process, with the options that are given here.
    """

    def __init__(
        self,
        bundles: Mapping[str, Path],
        *,
        admission: Admission,
        load: LoadOptions = DEFAULTS,
        scheduled: SchedulerOptions = SCHEDULED,
        observe: Callable[[str], Observer] = lambda name: UNOBSERVED,
        warm_up_seconds: float = 30.0,
        budget: int | None = None,
        awaited: Sequence[str] | None = None,
        loras: Mapping[str, LoraChoice] | None = None,
        shared: Mapping[str, tuple[str, LoraChoice]] | None = None,
        opener: Opener | None = None,
    ) -> None:
        self.bundles = dict(bundles)
        self.admission = admission
        self.budget = budget
        self._shared = {name: base for name, (base, _) in (shared or {}).items()}
        local = LocalOpener(load, scheduled, warm_up_seconds, shared or {})
        self._opener = local if opener is None else opener
        self._observe = observe
        self._loras = dict(loras or {})
        own = self.bundles.keys() - self._shared.keys()
        self._slots = {name: Slot(name, path) for name, path in self.bundles.items() if name in own}
        self.awaited = tuple(self.names[:1] if awaited is None else awaited)
        self._missing = {
            self._base(name) for name in self.awaited
        }  # those of the awaited that have not been opened yet
        self._room = Room(self._slots.values(), budget)
        self._changed = self._room.changed
        self._turn = (
            threading.Lock()
        )  # one bundle is loaded at a time, so that each sees the memory that is left

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.bundles)

    @contextmanager
    def using(self, name: str | None = None, *, timeout: float | None = None) -> Iterator[Model]:
        """The model of this name, which stays open inside the block. Opening it may take minutes.

        Args:
            name: None takes the default.
            timeout: how many seconds to wait for it.

        Raises:
            Refusal: no bundle is served under this name (404), it cannot be opened now (503), or not in time (504).
        """
        slot, end = self._slot(name), None if timeout is None else monotonic() + timeout
        with self._waiting(slot):
            while not isinstance(taken := self._take(slot), Model):
                try:
                    taken.result(None if end is None else max(0.0, end - monotonic()))
                except TimeoutError as e:
                    raise _too_late(slot.name) from e
        try:
            yield self._seen(taken, name)
        finally:
            self._leave(taken)

    @asynccontextmanager
    async def using_async(
        self, name: str | None = None, *, timeout: float | None = None
    ) -> AsyncIterator[Model]:
        """As `using`, without blocking the event loop while a bundle is opened."""
        slot, end = self._slot(name), None if timeout is None else monotonic() + timeout
        with self._waiting(slot):
            while not isinstance(taken := self._take(slot), Model):
                left = None if end is None else max(0.0, end - monotonic())
                try:  # shielded, because others wait for the same load
                    await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(taken)), left)
                except TimeoutError as e:
                    raise _too_late(slot.name) from e
        try:
            yield self._seen(taken, name)
        finally:
            self._leave(taken)

    def open(self, name: str) -> None:
        """Open a bundle for the operator, who may read why it fails.

        Raises:
            DitcError: why it cannot be opened.
        """
        slot = self._slot(name)
        with self._changed:
            slot.again = 0.0
            if slot.model is not None:
                return
            loading = self._load(slot)
        loading.result()
        if slot.model is None and slot.error is not None:
            raise slot.error

    def reload(self, names: Sequence[str] = ()) -> dict[str, str]:
        """Open rebuilt bundles beside the versions that are in use, and replace those.

        A version whose successor cannot be opened stays. A bundle that is not loaded is read when it is asked for.

        Args:
            names: those to look at; all if none is given.

        Returns:
            what was done, by name: reloaded, unchanged, not_loaded or failed.
        """
        return {name: self._reloaded(self._slot(name)) for name in names or self._slots}

    def states(self) -> tuple[ModelState, ...]:
        """The state of every model, in words for clients."""
        with self._changed:
            return self._states()

    def opened(self, name: str) -> Model | None:
        """The model of this name if it is open. It may be closed at any time, so it is only good for looking at."""
        slot = self._slots.get(self._base(name))
        return None if slot is None or slot.model is None else slot.model.under(name)

    def all_opened(self) -> tuple[Model, ...]:
        """All models that are open, only to be looked at; of those that share sessions, the one that has them."""
        with self._changed:
            return tuple(slot.model for slot in self._slots.values() if slot.model is not None)

    @property
    def ready(self) -> bool:
        """Whether all awaited models have been opened, and all that are open can draw."""
        with self._changed:
            broken = any(state.awaited or state.state == "unavailable" for state in self._states())
            return not broken and not self._room.closing

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._room.closing

    @property
    def idle(self) -> bool:
        """Whether no request is accepted and not ended."""
        return self.admission.requests == 0

    def close(self, timeout: float | None = None) -> bool:
        """End all requests, and close all models.

        Args:
            timeout: how many seconds to wait for steps that are running. A model whose step takes longer stays open.

        Returns:
            whether all are closed.
        """
        end = None if timeout is None else monotonic() + timeout
        with self._changed:
            self._room.closing = True
            for slot in self._slots.values():
                if slot.loading is not None:  # whoever waits for it is told that the server ends
                    _end(slot.loading)
            models = [
                *self._room.retired,
                *(slot.model for slot in self._slots.values() if slot.model is not None),
            ]
            loading = any(slot.loading is not None for slot in self._slots.values())
            for slot in self._slots.values():
                slot.model = None
            self._changed.notify_all()
        closed = [
            model.scheduler.close(None if end is None else max(0.0, end - monotonic())) for model in models
        ]
        return all(closed) and not loading

    # --- taking and giving back

    def _base(self, name: str) -> str:
        """The name of the model whose sessions one has; its own, if it shares none."""
        return self._shared.get(name, name)

    def _seen(self, model: Model, name: str | None) -> Model:
        """The model as it draws for this name. Raises Unavailable if its LoRA could not be read."""
        seen = model.under(model.name if name is None else name)
        if seen is None:
            raise Unavailable(
                f"the model {name} cannot be drawn now: its LoRA could not be read", hint="come back later"
            )
        return seen

    def _slot(self, name: str | None) -> Slot:
        slot = self._slots.get(self._base(self.names[0] if name is None else name))
        if slot is None:
            raise Invalid(
                f"the model {name!r:.80} does not exist",
                hint=f"this server has {', '.join(self.names)}",
                param="model",
                status=404,
                code="model_not_found",
            )
        return slot

    def _take(self, slot: Slot) -> Model | Future[None]:
        """The model, with one more user, or what to wait for before the next try."""
        with self._changed:
            if self._room.closing:
                raise Unavailable("the server is shutting down", hint="come back later", retry_after=1.0)
            self._drop_stopped(slot)
            if slot.model is not None:
                slot.model.users += 1
                slot.used = monotonic()
                return slot.model
            if (left := slot.again - monotonic()) > 0:
                raise Unavailable(
                    f"the model {slot.name} cannot be opened at the moment",
                    hint="come back later",
                    retry_after=left,
                )
            return self._load(slot)

    @contextmanager
    def _waiting(self, slot: Slot) -> Iterator[None]:
        """Lets no other model take the memory of this one between its load and its first use."""
        with self._changed:
            slot.waiting += 1
        try:
            yield
        finally:
            with self._changed:
                slot.waiting -= 1
                self._changed.notify_all()

    def _leave(self, model: Model) -> None:
        with self._changed:
            model.users -= 1
            if model.users == 0 and model in self._room.retired:
                self._room.close_apart(model)
            self._changed.notify_all()

    def _drop_stopped(self, slot: Slot) -> None:
        """Replace a version whose thread has died. The caller holds the lock."""
        if slot.model is not None and slot.model.scheduler.stopped:
            log.error("the scheduler of %s has stopped, so it is opened again", slot.name)
            self._room.retire(slot.model)
            slot.model = None
            self._missing.add(slot.name)
            self._load(slot)

    # --- loading

    def _load(self, slot: Slot) -> Future[None]:
        """Begin to open the bundle, unless somebody has. The caller holds the lock."""
        if slot.loading is None:
            slot.loading = Future()
            thread = threading.Thread(
                target=self._open_into, args=(slot, slot.loading), name="ditc-load", daemon=True
            )
            thread.start()
        return slot.loading

    def _open_into(self, slot: Slot, loading: Future[None]) -> None:
        """Open the newest version of a bundle, and let new requests use it."""
        model, error = None, None
        try:
            with self._turn:
                log.info("opening %s", slot.name)
                expected = self._opener.expected_bytes(slot.bundle)
                self._room.make_room(slot, max(expected, min(slot.size_bytes, self.budget or 0)))
                model = self._opener.open(
                    slot.name,
                    slot.bundle,
                    admission=self.admission,
                    observer=self._observe(slot.name),
                    lora=self._loras.get(slot.name),
                )
        except DitcError as e:
            error = e
            log.error("%s cannot be opened: %s", slot.name, e)
        except BaseException as e:  # of a library; whoever waits must not wait for ever
            error = DitcError(
                f"{slot.bundle} cannot be opened: {type(e).__name__}: {e}",
                hint="try it alone with ditc verify BUNDLE --run",
            )
            log.exception("%s cannot be opened", slot.name)
        with self._changed:
            slot.loading, slot.error = None, error
            if model is None:
                pause = FAILURE_PAUSES[min(slot.failures, len(FAILURE_PAUSES) - 1)]
                slot.failures += 1
                slot.again = monotonic() + (1.0 if isinstance(error, Unavailable) else pause)
            else:
                old, slot.model = slot.model, model
                slot.failures, slot.again, slot.size_bytes = 0, 0.0, model.size_bytes
                self._missing.discard(slot.name)
                if self._room.closing:
                    old, slot.model = model, None
                if old is not None:
                    self._room.retire(old)
                self._room.keep_to_budget(slot)
            self._changed.notify_all()
            _end(loading)

    def _reloaded(self, slot: Slot) -> str:
        if (earlier := slot.loading) is not None:
            earlier.result()
        with self._changed:
            if slot.model is None:
                slot.again = 0.0
                return "not_loaded"
            digest = slot.model.digest
        try:
            if load_manifest(slot.bundle).digest == digest:
                return "unchanged"
        except DitcError as e:
            log.error("%s stays at version %.12s: %s", slot.name, digest, e)
            return "failed"
        with self._changed:
            loading = self._load(slot)
        loading.result()
        with self._changed:
            if slot.error is not None or slot.model is None:
                log.error("%s stays at version %.12s", slot.name, digest)
                return "failed"
            return "reloaded"

    def _states(self) -> tuple[ModelState, ...]:
        """The caller holds the lock."""
        for slot in self._slots.values():
            self._drop_stopped(slot)
        slots = {name: self._slots[self._base(name)] for name in self.names}
        return tuple(state_of(s, name, awaited=s.name in self._missing) for name, s in slots.items())


def _end(loading: Future[None]) -> None:
    """Let everybody go on who waits for a load. The caller holds the lock."""
    if not loading.done():
        loading.set_result(None)


def _too_late(name: str) -> TooLate:
    return TooLate(f"the model {name} was not opened in time", hint="allow more time", retry_after=1.0)
