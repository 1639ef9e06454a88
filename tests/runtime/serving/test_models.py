"""Models: opened when asked for, within a memory budget, replaced in operation, and closed after their last request."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.runtime.bundle.manifest import load_manifest, save_manifest
from ditc.runtime.errors import DitcError, NumericsError, SessionError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.serving import model as module
from ditc.runtime.serving import room
from ditc.runtime.serving.model import Model
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Refusal
from ditc.runtime.serving.room import Held, to_close
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.scheduling.job import Event, Finished, Refused
from ditc.runtime.serving.settings import Bounds

REQUEST = Request(prompt="red cat", num_inference_steps=3, height=64, width=64, seed=3, output_type="pil")
PATIENCE = 60.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class FakeScheduler:
    """Of a model that only is open or closed."""

    def __init__(self) -> None:
        self.closed = self.stopped = False
        self.problem = ""
        self.pipeline = SimpleNamespace(manifest=SimpleNamespace(digest="1"))

    def close(self, timeout: float | None = None) -> bool:
        self.closed = True
        return True


class Fakes:
    """Opens fake models, which are expected to take one byte, and counts them."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.fails: Exception | None = None
        self.size_bytes = 1

    def open(self, name: str, bundle: Path, **options: Any) -> Model:
        self.opened.append(name)
        assert self.go_on.wait(PATIENCE)
        if self.fails is not None:
            raise self.fails
        return Model(name=name, scheduler=FakeScheduler(), size_bytes=self.size_bytes)  # type: ignore[arg-type]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    monkeypatch.setattr(module, "open_model", made.open)
    monkeypatch.setattr(module, "expected_bytes", lambda bundle, load: 1)
    return made


def of_names(*names: str, budget: int | None = None) -> Models:
    bundles = {name: Path("/private/place") / name for name in names}
    return Models(bundles, admission=Admission(Bounds()), budget=budget)


def states(models: Models) -> dict[str, str]:
    return {state.name: state.state for state in models.states()}


# Opening


def test_requests_for_a_model_that_is_being_opened_wait_for_the_same_load(fakes: Fakes) -> None:
    models, used = of_names("a"), []
    fakes.go_on.clear()

    def use() -> None:
        with models.using() as model:
            used.append(model)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: states(models) == {"a": "loading"})
    assert not models.ready
    fakes.go_on.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert fakes.opened == ["a"] and len(used) == 4 and len(set(used)) == 1 and models.ready


def test_a_coroutine_waits_for_a_load_within_its_time_and_blocks_nothing(fakes: Fakes) -> None:
    models = of_names("a")
    fakes.go_on.clear()

    async def use() -> None:
        with pytest.raises(Refusal, match="in time") as caught:
            async with models.using_async(timeout=0.05):
                pass
        assert caught.value.status == 504
        asyncio.get_running_loop().call_later(0.05, fakes.go_on.set)
        async with models.using_async("a") as model:
            assert model.users == 1
        assert model.users == 0

    asyncio.run(use())
    assert fakes.opened == ["a"]


def test_an_unknown_model_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(Refusal, match="'c' does not exist") as caught, of_names("a", "b").using("c"):
        pass
    assert caught.value.status == 404 and "a, b" in str(caught.value.hint)


def test_a_failed_load_is_remembered_for_a_while_and_clients_learn_no_paths(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, fakes.fails = of_names("a"), OSError("/private/place is bad")
    for _ in range(3):
        with pytest.raises(Refusal, match="cannot be opened at the moment") as caught, models.using():
            pass
    assert fakes.opened == ["a"] and caught.value.status == 503 and "private" not in str(caught.value)
    assert caught.value.retry_after is not None and caught.value.retry_after > 4
    assert not models.ready and states(models) == {"a": "failed"}
    with pytest.raises(DitcError, match="/private/place is bad"):  # the operator may read it, and try again
        models.open("a")
    fakes.fails = None
    models._slots["a"].again = 0.0
    with models.using():
        assert models.ready


def test_who_waits_for_a_load_when_the_server_ends_is_told(fakes: Fakes) -> None:
    models = of_names("a")
    fakes.go_on.clear()
    threading.Timer(0.05, lambda: models.close(0.0)).start()
    with pytest.raises(Refusal, match="shutting down"), models.using():
        pass
    fakes.go_on.set()


# The budget


def test_the_least_recently_used_model_makes_room_and_never_one_that_is_in_use(fakes: Fakes) -> None:
    models = of_names("a", "b", "c", budget=2)
    with models.using("a") as a:
        with models.using("b") as b:
            pass
        with models.using("c"):
            until(lambda: b.scheduler.closed)
            assert (
                states(models) == {"a": "ready", "b": "not_loaded", "c": "ready"} and not a.scheduler.closed
            )
    with models.using("b"):  # a was used before c
        until(lambda: a.scheduler.closed)
        assert states(models) == {"a": "not_loaded", "b": "ready", "c": "ready"}


def test_a_model_that_has_no_room_beside_those_in_use_waits_and_is_then_refused(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = of_names("a", "b", budget=1)
    monkeypatch.setattr(room, "ROOM_SECONDS", 0.05)
    with models.using("a") as a:
        with pytest.raises(Refusal) as caught, models.using("b"):
            pass
        assert caught.value.status == 503 and not a.scheduler.closed
        monkeypatch.setattr(room, "ROOM_SECONDS", PATIENCE)
        models._slots["b"].again = 0.0
        entered = threading.Event()

        def use() -> None:
            with models.using("b"):
                entered.set()

        thread = threading.Thread(target=use)
        thread.start()
        until(lambda: models._slots["b"].loading is not None)
    assert entered.wait(PATIENCE) and a.scheduler.closed
    thread.join()


def test_models_that_make_room_for_each_other_are_used_once_they_are_open(fakes: Fakes) -> None:
    models, turns = of_names("a", "b", budget=1), 10
    used = []

    def use(name: str) -> None:
        for _ in range(turns):
            with models.using(name) as model:
                used.append(model.name)

    threads = [threading.Thread(target=use, args=(name,)) for name in models.names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(used) == ["a"] * turns + ["b"] * turns and len(fakes.opened) <= 2 * turns


def test_a_model_that_takes_more_than_was_expected_makes_others_go(fakes: Fakes) -> None:
    models = of_names("a", "b", "c", budget=3)
    models.open("a")
    models.open("b")
    fakes.size_bytes = 2
    models.open("c")
    assert states(models) == {"a": "not_loaded", "b": "ready", "c": "ready"}


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.booleans()), max_size=8),
    budget=st.integers(-5, 40),
)
def test_what_goes_is_enough_and_not_in_use_and_the_least_recently_used(
    sizes: list[tuple[int, int, bool]], budget: int
) -> None:
    held = [
        Held(name=str(i), size_bytes=size, used=used, stays=stays)
        for i, (size, used, stays) in enumerate(sizes)
    ]
    names = to_close(held, budget)
    left = [one for one in held if one.name not in (names or ())]
    if names is None:
        assert sum(one.size_bytes for one in held if one.stays) > budget
        return
    gone = [one for one in held if one.name in names]
    assert sum(one.size_bytes for one in left) <= budget and not any(one.stays for one in gone)
    assert all(one.used <= other.used for one in gone for other in left if not other.stays)
    if names:
        last = held[int(names[-1])]
        assert sum(one.size_bytes for one in [*left, last]) > budget


def test_a_bundle_that_is_larger_than_the_budget_is_refused(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "expected_bytes", lambda bundle, load: 3 * 10**9)
    with pytest.raises(DitcError, match=r"takes about 3.00 GB, and the memory budget is 2.00 GB"):
        of_names("a", budget=2 * 10**9).open("a")
    assert not fakes.opened


# With real bundles


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


@pytest.fixture
def real(bundle: Path) -> Iterator[Models]:
    """The model "tiny", opened quickly."""
    models = Models(
        {"tiny": bundle}, admission=Admission(Bounds()), load=LoadOptions(threads=1), warm_up_seconds=0.0
    )
    yield models
    models.close()


def rebuild(bundle: Path, steps: int) -> None:
    """Another version of a bundle."""
    manifest = load_manifest(bundle)
    save_manifest(replace(manifest, defaults=replace(manifest.defaults, num_inference_steps=steps)), bundle)


def draw(model: Model, **options: Any) -> Any:
    """The end of REQUEST."""
    ended, ends = threading.Event(), list[Event]()

    def listen(event: Event) -> None:
        if isinstance(event, Finished | Refused):
            ends.append(event)
            ended.set()

    model.submit(REQUEST, listen, id="1", **options)
    assert ended.wait(PATIENCE)
    return ends[0]


def picture(end: Any) -> Any:
    return np.asarray(end.images[0])


def test_a_bundle_that_fails_its_self_test_never_becomes_ready(
    real: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditc.runtime.bundle import selftest

    def wrong(stage: str, session: Any, artifact: Any, golden: Any) -> Any:
        line = selftest._without_golden(stage)
        return replace(line, value=0.5, bound=1e-5, passed=False) if stage == "denoiser" else line

    closed, close = [], Pipeline.close
    monkeypatch.setattr(selftest, "self_test", wrong)
    monkeypatch.setattr(Pipeline, "close", lambda pipeline: (closed.append(pipeline), close(pipeline)))
    with pytest.raises(NumericsError, match="the self-test failed: denoiser"):
        real.open("tiny")
    assert not real.ready and states(real) == {"tiny": "failed"} and len(closed) == 1
    with pytest.raises(Refusal) as caught, real.using():
        pass
    assert caught.value.status == 503


def test_a_reload_swaps_a_rebuilt_bundle_and_loses_no_request(real: Models, bundle: Path) -> None:
    with real.using() as old:
        expected = picture(draw(old))
        assert real.reload() == {"tiny": "unchanged"}
        rebuild(bundle, steps=7)
        assert real.reload() == {"tiny": "reloaded"}
        with real.using() as new:
            assert new is not old and new.pipeline.manifest.defaults.num_inference_steps == 7
            assert np.array_equal(picture(draw(new)), expected)
        assert np.array_equal(
            picture(draw(old)), expected
        )  # it began before, so it ends with what it began with
    until(lambda: not real._room.retired)
    with pytest.raises(SessionError):
        old.pipeline.plan(REQUEST)


def test_a_reload_that_fails_keeps_the_old_version(real: Models, bundle: Path) -> None:
    with real.using() as old:
        rebuild(bundle, steps=7)
        manifest = (bundle / "manifest.json").read_bytes()
        weights = bundle / load_manifest(bundle).stages["denoiser"].artifacts[0].data[0].path
        content = weights.read_bytes()
        weights.unlink()  # the old version has it mapped
        weights.write_bytes(content[:-1] + b"!")
        assert real.reload() == {"tiny": "failed"}
        (bundle / "manifest.json").write_text("{")
        assert real.reload() == {"tiny": "failed"}
        assert real.ready and isinstance(draw(old), Finished)
        (bundle / "manifest.json").write_bytes(manifest)
        weights.write_bytes(content)
        assert real.reload() == {"tiny": "reloaded"}


Pipelines = list["weakref.ref[Pipeline]"]


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> tuple[Pipelines, Pipelines]:
    """The pipelines that are loaded, and those that are closed."""
    opened, closed, load, close = [], [], Pipeline.load.__func__, Pipeline.close  # type: ignore[attr-defined]

    def loads(cls: Any, *arguments: Any, **options: Any) -> Any:
        pipeline = load(cls, *arguments, **options)
        opened.append(weakref.ref(pipeline))
        return pipeline

    def closes(pipeline: Pipeline) -> None:
        closed.append(weakref.ref(pipeline))
        close(pipeline)

    monkeypatch.setattr(Pipeline, "load", classmethod(loads))
    monkeypatch.setattr(Pipeline, "close", closes)
    return opened, closed


def test_many_reloads_and_crashes_leave_nothing_open(
    pipelines: tuple[Pipelines, Pipelines], real: Models, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, closed = pipelines
    for steps in range(3, 6):
        with real.using() as model:
            assert isinstance(draw(model), Finished)
        rebuild(bundle, steps)
        assert real.reload() == {"tiny": "reloaded"}
        until(lambda: not real._room.retired)
    for _ in range(3):
        with real.using() as model:
            with monkeypatch.context() as planted:
                planted.setattr(type(model.scheduler._work.batches), "step", lambda *_: 1 / 0)
                assert draw(model).refusal.status == 500
            assert isinstance(draw(model), Finished)
    assert len(opened) == 7 and closed == opened[:6]
    until(lambda: not gc.collect() and [one for one in opened if one() is not None] == opened[6:])


def test_a_scheduler_whose_thread_dies_is_told_and_replaced(
    real: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    with real.using() as old:

        def die() -> None:
            raise MemoryError

        monkeypatch.setattr(old.scheduler, "_next", die)
        end = draw(old)
        assert isinstance(end, Refused) and end.refusal.status == 500  # nobody waits for ever
        until(lambda: old.scheduler.stopped)
        assert not real.ready
    with real.using() as new:
        assert new is not old and isinstance(draw(new), Finished) and real.ready


def test_a_bundle_that_is_rebuilt_before_a_session_fails_draws_no_picture_with_two_versions(
    real: Models, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with real.using() as model:
        rebuild(bundle, steps=7)
        step = type(model.scheduler._work.batches).step
        calls = []

        def crash(self: Any, key: Any, batch: Any) -> Any:
            calls.append(key)
            if len(calls) == 2:
                raise RuntimeError("planted")
            return step(self, key, batch)

        monkeypatch.setattr(type(model.scheduler._work.batches), "step", crash)
        assert draw(model).refusal.status == 500
        until(lambda: not model.scheduler.problem)
        assert isinstance(draw(model), Finished)
        assert model.pipeline.manifest.defaults.num_inference_steps == 7


def test_closing_ends_what_is_in_work_and_says_so(real: Models) -> None:
    with real.using() as model:
        model.scheduler._work.pipeline = SimpleNamespace(  # type: ignore[assignment]
            **{
                "states": lambda plan: iter([time.sleep(0.3)]),
                "manifest": model.pipeline.manifest,
                "sessions": model.pipeline.sessions,
                "drawable": model.pipeline.drawable,
                "close": model.pipeline.close,
            }
        )
        closing = threading.Timer(0.05, lambda: real.close(10.0))
        closing.start()
        assert draw(model).refusal.status == 503
        closing.join()
    with pytest.raises(Refusal, match="shutting down"), real.using():
        pass
