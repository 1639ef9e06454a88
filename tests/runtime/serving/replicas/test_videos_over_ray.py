"""A video that is larger than Ray's shared memory comes from an actor of Ray to the front."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_scheduler import Server

from ditc.runtime.load_options import LoadOptions
from ditc.runtime.serving.replicas.messages import PART_BYTES, Message
from ditc.runtime.serving.replicas.opener import ReplicaOpener
from ditc.runtime.serving.replicas.options import ReplicaOptions
from ditc.runtime.serving.replicas.pool import Pool
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.scheduling.observer import UNOBSERVED
from ditc.runtime.serving.settings import SchedulerOptions

pytestmark = pytest.mark.scale
ray = pytest.importorskip("ray", reason="needs the extra: pip install ditc[ray]")

SHARED_BYTES = 10**8


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    from ditc.runtime.serving.replicas.cluster import RayCluster

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=SHARED_BYTES,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    made = Pool(RayCluster("tests-of-large-videos", ReplicaOptions()), ReplicaOptions())
    made.start()
    yield made
    made.stop()
    ray.shutdown()


@pytest.fixture(scope="module")
def server(pool: Pool, tiny_bundle: Path) -> Iterator[Server]:
    opener = ReplicaOpener(
        pool, load=LoadOptions(threads=1), scheduled=SchedulerOptions(), warm_up_seconds=0.0
    )
    scheduler: Any = opener.open(
        "tiny", tiny_bundle, admission=Admission(Bounds()), observer=UNOBSERVED
    ).scheduler
    yield Server(scheduler)
    scheduler.close()


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of pixels of each message that has come."""
    from ditc.runtime.serving.replicas.cluster import RayHandle

    came: list[int] = []
    draw = RayHandle.draw

    async def recorded(self: RayHandle, asked: Message) -> AsyncIterator[Message]:
        async for message in draw(self, asked):
            came.extend([len(message["pixels"])] if "pixels" in message else [])
            yield message

    monkeypatch.setattr(RayHandle, "draw", recorded)
    return came


def test_a_video_may_be_larger_than_the_shared_memory(server: Server, pool: Pool, parts: list[int]) -> None:
    frames, side = 100, 1000

    def plant(replica: Any) -> None:
        """Let the replica answer at once with frames of noise, whatever it is asked for."""
        from types import SimpleNamespace

        import numpy as np
        from PIL import Image

        from ditc.runtime.serving.scheduling.job import Finished

        ((version, model),) = replica._models.items()

        def submit(request: object, listener: Any, **options: object) -> Any:
            video = tuple(
                Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8))
                for number in range(frames)
            )
            listener(Finished(images=(), failures=(), seconds={}, videos=(video,)))
            return SimpleNamespace(cancelled=False)

        replica._models[version] = SimpleNamespace(submit=submit, scheduler=model.scheduler)

    (seat,) = pool.seats
    ray.get(seat.handle.actor.__ray_call__.remote(plant))  # type: ignore[attr-defined]
    video = server.draw().videos[0]
    assert video is not None and len(video) == frames
    for number, frame in enumerate(video):
        noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        assert np.array_equal(np.asarray(frame), noise)
    assert sum(parts) == frames * side * side * 3 > 2 * SHARED_BYTES
    assert max(parts) == PART_BYTES
