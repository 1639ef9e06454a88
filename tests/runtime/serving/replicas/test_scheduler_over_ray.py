"""The tests of the single server's scheduler, unchanged, with Ray.

Some run against the scheduler whose replicas are actors of Ray. The others look into a scheduler or plant faults in its
process. Replicas run that very scheduler, so the whole file is run where replicas run, in a worker of Ray, too.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving_scheduler import Serve, Server

from ditc.runtime.load_options import LoadOptions
from ditc.runtime.serving.replicas.opener import ReplicaOpener
from ditc.runtime.serving.replicas.options import ReplicaOptions
from ditc.runtime.serving.replicas.pool import Pool
from ditc.runtime.serving.replicas.remote_scheduler import RemoteScheduler
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.scheduling.observer import UNOBSERVED
from ditc.runtime.serving.settings import SchedulerOptions

pytestmark = pytest.mark.scale
ray = pytest.importorskip("ray", reason="needs the extra: pip install ditc[ray]")

ROOT = Path(__file__).parents[4]
TESTS = "tests/runtime/serving/scheduling/test_scheduler.py"


def _tests() -> Any:
    spec = importlib.util.spec_from_file_location("tests_of_the_scheduler", ROOT / TESTS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_SAME = _tests()
test_previews = _SAME.test_previews_come_between_the_steps_and_are_as_many_as_asked_for
test_waiting = _SAME.test_a_request_that_waits_can_be_cancelled_and_never_begins
test_full = _SAME.test_a_full_queue_refuses_and_has_room_again_later
test_listener = _SAME.test_a_listener_that_fails_cancels_its_request_alone
test_closing = _SAME.test_closing_ends_every_request_once_and_refuses_new_ones


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=10**8,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(started: None) -> Iterator[Pool]:
    from ditc.runtime.serving.replicas.cluster import RayCluster

    options = ReplicaOptions()
    made = Pool(RayCluster("tests-of-the-scheduler", options), options)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def serve(pool: Pool, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """As the fixture of the scheduler's tests, over one replica."""
    monkeypatch.setattr(RemoteScheduler, "idle", property(lambda self: not self._jobs), raising=False)
    made: list[Any] = []

    def make(*, bounds: Bounds | None = None, start: bool = True) -> Server:
        opener = ReplicaOpener(
            pool, load=LoadOptions(threads=1), scheduled=SchedulerOptions(), warm_up_seconds=0.0
        )
        admission = Admission(bounds or Bounds())
        scheduler: Any = opener.open("tiny", tiny_bundle, admission=admission, observer=UNOBSERVED).scheduler
        made.append(scheduler)
        (seat,) = pool.seats

        def begin() -> None:
            seat.ready = True

        # What the tests know of the other scheduler.
        scheduler.admission, scheduler.start = admission, begin
        scheduler._queue = SimpleNamespace(pictures=[], tasks=[])
        seat.ready = start
        return Server(scheduler)

    yield make
    for scheduler in made:
        scheduler.close()
    for seat in pool.seats:
        seat.ready = True


def test_the_tests_of_the_scheduler_pass_in_a_worker_of_ray(started: None, tiny_bundle: Path) -> None:
    root, folder, tests = str(ROOT), str(tiny_bundle.parent / "in-a-worker"), TESTS

    def run() -> int:
        os.chdir(root)
        os.environ["PYTEST_XDIST_WORKER"] = (
            "ray"  # as one of several processes, it takes the bundle that is there
        )
        return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--basetemp", folder, tests]))

    assert ray.get(ray.remote(run).remote()) == 0
