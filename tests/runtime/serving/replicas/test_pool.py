"""Requests over replicas: who gets them, what happens when one is lost or hangs, and how many there are."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
from fake_cluster import FakeCluster, FakeHandle
from serving_scheduler import PATIENCE, Server

from ditc.runtime.bundle.manifest import load_manifest, save_manifest
from ditc.runtime.errors import DitcError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Overloaded, TooLate
from ditc.runtime.serving.replicas import replica
from ditc.runtime.serving.replicas.handle import Bundle, ReplicaLost
from ditc.runtime.serving.replicas.messages import Message, Opened, Version
from ditc.runtime.serving.replicas.opener import ReplicaOpener
from ditc.runtime.serving.replicas.options import ReplicaOptions
from ditc.runtime.serving.replicas.pool import Pool
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.scheduling.job import Cancelled, Event, Finished, Preview, Progress, Refused
from ditc.runtime.serving.settings import SchedulerOptions

LONG = 60  # steps; enough for a test to interfere


class Replicas:
    """A pool over fake replicas, with the models that it serves."""

    def __init__(
        self,
        bundle: Path,
        bounds: Bounds | None = None,
        there: str | None = None,
        cluster: FakeCluster | None = None,
        **options: Any,
    ) -> None:
        self.cluster = FakeCluster(there) if cluster is None else cluster
        self.pool = Pool(self.cluster, ReplicaOptions(**options))
        opener = ReplicaOpener(
            self.pool, load=LoadOptions(threads=1), scheduled=SchedulerOptions(), warm_up_seconds=0.0
        )
        self.models = Models({"tiny": bundle}, admission=Admission(bounds or Bounds()), opener=opener)
        self.pool.start()

    def server(self) -> Server:
        with self.models.using() as model:
            return Server(model.scheduler)  # type: ignore[arg-type]

    def all_ready(self, count: int) -> None:
        until(lambda: sum(seat.ready for seat in self.pool.seats) == count)


@pytest.fixture
def replicas(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Replicas]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where bundles are fetched to
    made: list[Replicas] = []

    def make(bundle: Path = tiny_bundle, **options: Any) -> Replicas:
        made.append(Replicas(bundle, **options))
        return made[-1]

    yield make
    for one in made:
        for handle in one.cluster.handles:
            handle.frozen = False
        one.models.close()
        one.pool.stop()
        for handle in one.cluster.handles:
            for model in handle.replica._models.values():
                model.scheduler.close()


def until(condition: Callable[[], bool]) -> None:
    end = monotonic() + PATIENCE
    while not condition():
        assert monotonic() < end
        sleep(0.01)


def drawn_alone(bundle: Path, steps: int) -> np.ndarray:
    with_all = {"num_inference_steps": steps, "height": 64, "width": 64, "seed": 3}
    pipeline = Pipeline.load(bundle, threads=1)
    try:
        return np.asarray(pipeline.draw(Request(prompt="red cat", **with_all)).images[0])  # type: ignore[arg-type]
    finally:
        pipeline.close()


def at_first_step(action: Callable[[], None]) -> Callable[[Event], None]:
    """A listener that acts once, when the first progress comes."""
    done = threading.Event()

    def listen(event: Event) -> None:
        if isinstance(event, Progress) and not done.is_set():
            done.set()
            action()

    return listen


def test_pictures_are_those_of_the_pipeline_and_nothing_stays_accepted(
    replicas: Callable[..., Replicas], tiny_bundle: Path
) -> None:
    made = replicas(least=2, most=2)
    server = made.server()
    ends = [heard.wait() for _, heard in [server.submit(num_images_per_prompt=2, previews=1)]]
    job, heard = server.submit(previews=1)
    end = heard.wait()
    assert np.array_equal(np.asarray(end.images[0]), drawn_alone(tiny_bundle, 3))
    assert np.array_equal(np.asarray(ends[0].images[0]), np.asarray(end.images[0]))
    assert sum(isinstance(event, Preview) for event in heard.events) == 1
    assert end.seconds.keys() == {"wait", "text", "denoise", "decode", "total"}
    until(lambda: made.models.admission.requests == made.models.admission.pixel_steps == 0)
    assert job.end is end


def test_requests_go_to_the_replica_with_the_least_work(replicas: Callable[..., Replicas]) -> None:
    made = replicas(least=2, most=2)
    server = made.server()
    made.all_ready(2)
    heard = [server.submit(num_inference_steps=30)[1] for _ in range(4)]
    for one in heard:
        one.wait()
    assert [len(handle.begun) for handle in made.cluster.handles] == [2, 2]


@pytest.mark.parametrize("fault", ["killed", "frozen", "stuck"])
def test_a_request_whose_replica_is_lost_is_drawn_by_another_one(
    replicas: Callable[..., Replicas], tiny_bundle: Path, fault: str
) -> None:
    made = replicas(least=2, most=2, hang_seconds=1.0)
    server = made.server()
    made.all_ready(2)

    def break_it() -> None:
        first = next(handle for handle in made.cluster.handles if handle.begun)
        if fault == "killed":
            first.dead = True
        elif fault == "frozen":
            first.frozen = True
        else:
            first.stuck = 9.0

    end = server.submit(num_inference_steps=LONG, then=at_first_step(break_it))[1].wait()
    assert np.array_equal(np.asarray(end.images[0]), drawn_alone(tiny_bundle, LONG))
    begun = [asked for handle in made.cluster.handles for asked in handle.begun]
    assert len(begun) == 2 and begun[0]["request"] == begun[1]["request"]
    made.all_ready(2)
    assert len(made.cluster.living) == 2
    until(lambda: made.models.admission.requests == 0)


def test_a_request_without_a_seed_gets_the_same_one_in_both_replicas(
    replicas: Callable[..., Replicas],
) -> None:
    made = replicas(least=2, most=2)
    server = made.server()
    made.all_ready(2)

    def kill() -> None:
        next(handle for handle in made.cluster.handles if handle.begun).dead = True

    job, heard = server.submit(num_inference_steps=LONG, seed=None, then=at_first_step(kill))
    heard.wait()
    seeds = [asked["request"]["seed"] for handle in made.cluster.handles for asked in handle.begun]
    assert seeds == [job.plan.seed] * 2


def test_a_request_that_ends_two_replicas_is_given_up(replicas: Callable[..., Replicas]) -> None:
    made = replicas(least=2, most=2)
    server = made.server()

    def kill_who_draws(event: Event) -> None:
        if isinstance(event, Progress):
            for handle in made.cluster.living:
                handle.dead = bool(handle.begun)

    # The second replica reports the steps that are new to the client, so both are killed by this.
    end = server.submit(num_inference_steps=LONG, then=kill_who_draws)[1].wait()
    assert isinstance(end, Refused) and (end.refusal.status, end.refusal.code) == (500, "generation_failed")
    until(lambda: made.models.admission.requests == 0)
    assert isinstance(server.submit()[1].wait(), Finished)


def test_cancelling_stops_the_replica(replicas: Callable[..., Replicas]) -> None:
    made = replicas()
    server, begun = made.server(), threading.Event()
    job, heard = server.submit(num_inference_steps=1000, then=at_first_step(begun.set))
    assert begun.wait(PATIENCE)
    server.scheduler.cancel(job)
    assert isinstance(heard.wait(), Cancelled)
    until(lambda: not made.cluster.handles[0].replica._jobs)
    assert made.models.admission.requests == 0


def test_the_bounds_are_those_of_all_replicas_together(replicas: Callable[..., Replicas]) -> None:
    made = replicas(bounds=Bounds(requests=3), least=2, most=2)
    server = made.server()
    jobs = [server.submit(num_inference_steps=1000)[0] for _ in range(3)]
    with pytest.raises(Overloaded) as refused:
        server.submit()
    assert refused.value.retry_after is not None
    with pytest.raises(Overloaded, match="takes at most"):
        made.models.admission.take(2**34, seconds_of_all=1.0)
    for job in jobs:
        server.scheduler.cancel(job)
    until(lambda: made.models.admission.requests == 0)


def test_deadlines_hold_while_a_request_waits(replicas: Callable[..., Replicas]) -> None:
    made = replicas()
    server = made.server()
    made.pool.seats[0].ready = False
    late = server.submit(timeout=1.0)[1].wait()
    assert isinstance(late, Refused) and isinstance(late.refusal, TooLate)
    assert made.cluster.handles[0].begun == [] and made.models.admission.requests == 0


def test_more_work_brings_replicas_and_idleness_ends_them(replicas: Callable[..., Replicas]) -> None:
    made = replicas(least=1, most=3, pixel_steps=64 * 64 * 100, idle_seconds=1.0)
    server = made.server()
    jobs = [server.submit(num_inference_steps=1000)[0] for _ in range(3)]
    made.all_ready(3)
    for job in jobs:
        server.scheduler.cancel(job)
    until(lambda: len(made.pool.seats) == 1)
    assert isinstance(server.submit()[1].wait(), Finished)


def test_a_rebuilt_bundle_replaces_the_old_one_and_loses_no_request(
    replicas: Callable[..., Replicas], tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    made = replicas(bundle, least=2, most=2)
    made.all_ready(2)
    with made.models.using() as old:
        running = [Server(old.scheduler).submit(num_inference_steps=LONG)[1] for _ in range(2)]  # type: ignore[arg-type]
        rebuild(bundle)
        assert made.models.reload() == {"tiny": "reloaded"}
        ends = [one.wait() for one in running]
    assert all(np.array_equal(np.asarray(end.images[0]), drawn_alone(bundle, LONG)) for end in ends)
    with made.models.using() as new:
        assert new.digest != old.digest
        assert isinstance(Server(new.scheduler).submit()[1].wait(), Finished)  # type: ignore[arg-type]
    until(lambda: all(len(handle.replica._models) == 1 for handle in made.cluster.living))


def test_a_replica_whose_node_has_another_version_does_not_open_it(
    replicas: Callable[..., Replicas], tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    made = replicas(bundle, least=2, most=2)
    server = made.server()
    made.all_ready(2)
    rebuild(bundle)
    made.cluster.handles[0].dead = True
    until(lambda: len(made.cluster.handles) == 3 and all(seat.ready for seat in made.pool.seats))
    (version,) = made.pool._bundles
    assert [version in seat.failed for seat in made.pool.seats] == [False, True]
    assert isinstance(server.submit()[1].wait(), Finished)
    assert made.models.reload() == {"tiny": "reloaded"}
    until(lambda: not any(seat.failed for seat in made.pool.seats))


def test_nodes_without_the_bundle_get_it_from_the_front(
    replicas: Callable[..., Replicas], tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ditc.runtime.serving.replicas")
    made = replicas(there=str(tmp_path / "nowhere"), least=2, most=2)
    server = made.server()
    made.all_ready(2)
    assert np.array_equal(np.asarray(server.draw().images[0]), drawn_alone(tiny_bundle, 3))
    place = tmp_path / "cache" / "ditc" / "bundles" / load_manifest(tiny_bundle).digest
    told = [record.getMessage() for record in caplog.records if "from the front" in record.getMessage()]
    assert len(told) == 2 and all(str(place) in line for line in told)


def test_a_fetched_bundle_that_is_damaged_later_says_how_to_mend_it(
    replicas: Callable[..., Replicas], tmp_path: Path
) -> None:
    replicas(there=str(tmp_path / "nowhere")).models.open("tiny")
    stored = tmp_path / "cache" / "ditc" / "bundles"
    for file in stored.glob("*/onnx/denoiser*.onnx"):
        file.write_bytes(b"damaged")
    with pytest.raises(DitcError, match="denoiser") as raised:
        replicas(there=str(tmp_path / "nowhere")).models.open("tiny")
    assert f"remove {stored}" in raised.value.hint


def test_a_bundle_that_no_replica_can_open_says_why(
    replicas: Callable[..., Replicas], tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    for file in (bundle / "onnx").glob("denoiser*.onnx"):
        file.write_bytes(b"damaged")
    with pytest.raises(DitcError, match="denoiser"):
        replicas(bundle).models.open("tiny")


def test_a_replica_that_ends_while_it_opens_a_bundle_is_asked_no_more(
    replicas: Callable[..., Replicas],
) -> None:
    made = replicas(least=2, most=2)
    made.models.open("tiny")
    made.all_ready(2)
    asked: list[str] = []
    spawn = made.cluster.spawn

    def spawn_one_that_ends() -> FakeHandle:
        handle = spawn()

        async def ends(version: Version, bundle: Bundle) -> Opened:
            asked.append(handle.name)
            handle.dead = True
            await asyncio.sleep(0.01)
            raise ReplicaLost("it was killed")

        handle.open = ends  # type: ignore[method-assign]
        made.cluster.spawn = spawn  # type: ignore[method-assign]
        return handle

    made.cluster.spawn = spawn_one_that_ends  # type: ignore[method-assign]
    made.cluster.handles[0].dead = True
    until(lambda: len(made.cluster.handles) == 4)
    made.all_ready(2)
    assert asked == [made.cluster.handles[2].name]


def test_a_fault_of_a_library_while_a_replica_opens_a_bundle_is_told(
    replicas: Callable[..., Replicas], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replicas(least=2, most=2)
    server = made.server()
    made.all_ready(2)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(replica, "open_model", fails)
    made.cluster.handles[0].dead = True
    until(lambda: len(made.cluster.handles) == 3)
    made.all_ready(2)  # one of them without the bundle
    (error,) = [error for seat in made.pool.seats for error in seat.failed.values()]
    assert "RuntimeError: no memory" in str(error) and error.hint
    assert isinstance(server.submit()[1].wait(), Finished)


def test_a_replica_tries_again_to_open_what_it_could_not(
    replicas: Callable[..., Replicas], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never did: without another replica, requests waited for ever."""
    made = replicas()
    server, failed, open_model = made.server(), list[int](), replica.open_model

    def fails_twice(*args: Any, **kwargs: Any) -> Any:
        if len(failed) < 2:
            failed.append(1)
            raise RuntimeError("no memory")
        return open_model(*args, **kwargs)

    monkeypatch.setattr(replica, "open_model", fails_twice)
    made.cluster.handles[0].dead = True
    until(lambda: len(made.cluster.handles) == 2)
    made.all_ready(1)
    assert isinstance(server.submit()[1].wait(), Finished)
    assert len(failed) == 2 and not made.pool.seats[0].failed


def test_a_replica_that_fails_before_it_opens_anything_is_replaced(
    replicas: Callable[..., Replicas],
) -> None:
    made = replicas()
    spawn = made.cluster.spawn

    def spawn_one_that_fails() -> FakeHandle:
        handle = spawn()

        async def fails() -> Message:
            raise RuntimeError("of Ray")

        handle.begin = fails  # type: ignore[method-assign]
        made.cluster.spawn = spawn  # type: ignore[method-assign]
        return handle

    made.cluster.spawn = spawn_one_that_fails  # type: ignore[method-assign]
    until(lambda: len(made.pool.seats) == 1)
    made.pool.seats[0].handle.dead = True  # type: ignore[attr-defined]
    until(lambda: len(made.cluster.handles) >= 3)
    made.all_ready(1)


def test_a_bundle_that_one_replica_cannot_open_stays_open_in_none(
    replicas: Callable[..., Replicas],
) -> None:
    made = replicas(least=2, most=2)
    made.all_ready(2)
    first, second = made.cluster.handles
    opening, refused = second.open, threading.Event()

    async def fails(version: Version, bundle: Bundle) -> Opened:
        raise DitcError("damaged", hint="copy it again")

    async def slowly(version: Version, bundle: Bundle) -> Opened:
        await asyncio.to_thread(refused.wait, PATIENCE)
        return await opening(version, bundle)

    first.open, second.open = fails, slowly  # type: ignore[method-assign]
    closed: list[Version] = []
    closing = second.close

    async def close(version: Version) -> None:
        await closing(version)
        closed.append(version)

    second.close = close  # type: ignore[method-assign]
    with pytest.raises(DitcError, match="damaged"):
        made.models.open("tiny")
    refused.set()
    until(lambda: bool(closed))
    assert not second.replica._models
    assert not any(seat.versions for seat in made.pool.seats) and not made.pool._opened


def test_a_version_that_is_served_again_stays_open_when_its_old_requests_end(
    replicas: Callable[..., Replicas], tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    made = replicas(bundle)
    with made.models.using():
        rebuild(bundle)
        assert made.models.reload() == {"tiny": "reloaded"}
        shutil.copy(tiny_bundle / "manifest.json", bundle / "manifest.json")
        assert made.models.reload() == {"tiny": "reloaded"}
    until(lambda: not made.models._room.retired)
    end = made.server().submit(timeout=30.0)[1].wait()
    assert isinstance(end, Finished), end
    until(lambda: len(made.cluster.handles[0].replica._models) == 1)


def test_another_front_goes_on_with_the_replicas_and_ends_what_was_in_work(
    replicas: Callable[..., Replicas],
) -> None:
    made = replicas()
    server, begun = made.server(), threading.Event()
    server.submit(num_inference_steps=1000, then=at_first_step(begun.set))
    assert begun.wait(PATIENCE)
    handle = made.cluster.handles[0]
    other = Pool(made.cluster, ReplicaOptions())
    other.start()
    try:
        until(lambda: not handle.replica._jobs)
        assert [seat.handle for seat in other.seats] == [handle]
    finally:
        other.stop()


def test_a_replica_that_fails_when_another_front_asks_for_it_is_replaced() -> None:
    class Failing(FakeHandle):
        async def begin(self) -> Message:
            raise RuntimeError("the replica has another class")  # as Ray raises errors of an actor's methods

    cluster = FakeCluster()
    cluster.handles.append(Failing("left"))
    pool = Pool(cluster, ReplicaOptions())
    pool.start()
    try:
        until(lambda: [seat.ready for seat in pool.seats] == [True])
        assert cluster.handles[0].dead and pool.seats[0].handle is cluster.handles[1]
    finally:
        pool.stop()


def test_a_replica_of_another_version_of_ditc_is_replaced_when_another_front_finds_it(
    replicas: Callable[..., Replicas],
) -> None:
    """The front ended instead, and with it the server."""

    class Older(FakeHandle):
        async def begin(self) -> Message:
            return {**await super().begin(), "ditc": "0.0.1"}

    cluster = FakeCluster()
    cluster.handles.append(Older("left"))
    made = replicas(cluster=cluster)
    made.models.open("tiny")
    assert [seat.handle for seat in made.pool.seats] == [cluster.handles[1]]


def test_another_front_opens_nothing_beside_what_the_earlier_one_has_left(
    replicas: Callable[..., Replicas], tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    made = replicas(bundle)
    made.models.open("tiny")
    handle = made.cluster.handles[0]
    (before,) = handle.replica._models
    other = Replicas(bundle, cluster=made.cluster)
    try:
        other.models.open("tiny")  # what is there is used
        assert list(handle.replica._models) == [before]
        rebuild(bundle)
        again = Replicas(bundle, cluster=made.cluster)
        try:
            again.models.open("tiny")
            (after,) = handle.replica._models
            assert after.name == before.name and after.digest != before.digest
        finally:
            again.models.close()
            again.pool.stop()
    finally:
        other.pool.stop()


def rebuild(bundle: Path) -> None:
    """Give the bundle another manifest, and with it another digest, as a build of other settings would."""
    manifest = load_manifest(bundle)
    defaults = replace(manifest.defaults, num_inference_steps=manifest.defaults.num_inference_steps + 1)
    save_manifest(replace(manifest, defaults=defaults), bundle)
