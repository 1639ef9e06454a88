"""Videos that replicas draw: their frames come in messages of a bounded size, and are those of the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cluster import FakeCluster
from serving_scheduler import Server

from ditc.runtime.load_options import LoadOptions
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.serving.replicas import messages
from ditc.runtime.serving.replicas.opener import ReplicaOpener
from ditc.runtime.serving.replicas.options import ReplicaOptions
from ditc.runtime.serving.replicas.pool import Pool
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.scheduling.observer import UNOBSERVED
from ditc.runtime.serving.settings import SchedulerOptions

SIZE: dict[str, Any] = {"height": 32, "width": 64, "num_inference_steps": 2, "frames": 13}
MOST = 5000


def test_the_frames_of_a_video_come_in_messages_of_a_bounded_size(
    video_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "PART_BYTES", MOST)
    cluster = FakeCluster()
    pool = Pool(cluster, ReplicaOptions())
    pool.start()
    opener = ReplicaOpener(
        pool, load=LoadOptions(threads=1), scheduled=SchedulerOptions(), warm_up_seconds=0.0
    )
    scheduler: Any = opener.open(
        "film", video_bundle, admission=Admission(Bounds()), observer=UNOBSERVED
    ).scheduler
    try:
        video = Server(scheduler).draw(**SIZE).videos[0]
    finally:
        scheduler.close()
        pool.stop()
        (handle,) = cluster.handles
        for model in list(handle.replica._models.values()):  # that the pool had no time to close
            model.scheduler.close()
    assert video is not None
    pipeline = Pipeline.load(video_bundle, threads=1)
    try:
        expected = pipeline.draw(Request(prompt="red cat", seed=3, **SIZE)).frames[0]
    finally:
        pipeline.close()
    assert len(video) == len(expected) == 13 and all(map(np.array_equal, video, expected))
    parts = [len(one["pixels"]) for one in handle.sent if "pixels" in one]
    assert parts == [MOST] * 15 + [32 * 64 * 3 * 13 - 15 * MOST]
