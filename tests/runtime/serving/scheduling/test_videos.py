"""Videos in the scheduler: decoded one latent frame at a time, ended in between, and begun anew after a crash."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_scheduler import PATIENCE, Serve

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.serving.scheduling.admission import work_of
from ditc.runtime.serving.scheduling.job import Cancelled, Finished, Progress, Refused
from ditc.runtime.serving.scheduling.step_times import StepTimes
from ditc.runtime.serving.scheduling.warm_up import warm_up
from ditc.runtime.session import Tensor
from ditc.runtime.spec import VAE_DECODER, VAE_DECODER_NEXT

SIZE: dict[str, Any] = {"height": 32, "width": 64, "num_inference_steps": 2, "frames": 13}


class Spy:
    """A stage that calls a function before every run, and may change the results."""

    def __init__(self, inner: Any, before: Callable[[], None], after: Callable[[Any], Any]) -> None:
        self.inner, self.before, self.after = inner, before, after
        self.spec, self.device = inner.spec, inner.device

    def run(self, feeds: Mapping[str, Tensor]) -> Any:
        self.before()
        return self.after(self.inner.run(feeds))

    def close(self) -> None:
        self.inner.close()


def opening(
    bundle: Path,
    before: Callable[[], None] = lambda: None,
    after: Callable[[Any], Any] = lambda outputs: outputs,
) -> Callable[[], Pipeline]:
    """Opens pipelines whose stage for later latent frames is a spy."""

    def load() -> Pipeline:
        pipeline = Pipeline.load(bundle, threads=1)
        pipeline.sessions[VAE_DECODER_NEXT] = Spy(pipeline.sessions[VAE_DECODER_NEXT], before, after)  # type: ignore[assignment]
        return pipeline

    return load


def same(video: Any, expected: Any) -> bool:
    return len(video) == len(expected) and all(map(np.array_equal, video, expected))


def test_videos_are_those_of_the_pipeline_and_progress_counts_steps_and_frames(
    serve: Serve, video_bundle: Path
) -> None:
    server = serve(reopen=opening(video_bundle))
    job, heard = server.submit(**SIZE)
    end = heard.wait()
    expected = server.scheduler.pipeline.draw(Request(prompt="red cat", seed=3, **SIZE)).frames[0]
    assert end.images == () and same(end.videos[0], expected)
    seen = [(one.step, one.frame) for one in heard.events if isinstance(one, Progress)]
    assert seen == [(1, 0), (2, 0), (2, 1), (2, 5), (2, 9), (2, 13)]
    assert end.seconds.keys() == {"wait", "text", "denoise", "decode", "total"}
    assert work_of(job.plan) == 32 * 64 * 13 * 2
    assert (server.scheduler.admission.requests, server.scheduler.admission.pixel_steps) == (0, 0)


def test_several_videos_of_a_request_and_one_that_fails(serve: Serve, video_bundle: Path) -> None:
    runs = []

    def spoiled(outputs: dict[str, Any]) -> dict[str, Any]:
        runs.append(1)
        name = next(iter(outputs))
        return outputs if len(runs) != 2 else {**outputs, name: np.full_like(outputs[name], np.nan)}

    server = serve(reopen=opening(video_bundle, after=spoiled))
    _, heard = server.submit(num_images_per_prompt=2, **SIZE)
    end = heard.wait()
    assert [None if video is None else len(video) for video in end.videos] == [None, 13]
    assert end.failures[0].index == 0 and "latent frame 2" in end.failures[0].reason
    runs.clear()
    _, alone = server.submit(**SIZE)
    lost = alone.wait()
    assert isinstance(lost, Refused) and lost.refusal.code == "bad_picture"


def test_a_video_of_one_colour_has_failed_unless_it_is_allowed(serve: Serve, video_bundle: Path) -> None:
    def load() -> Pipeline:
        pipeline = Pipeline.load(video_bundle, threads=1)
        for stage in (VAE_DECODER, VAE_DECODER_NEXT):
            grey = lambda outputs: {name: np.zeros_like(value) for name, value in outputs.items()}  # noqa: E731
            pipeline.sessions[stage] = Spy(pipeline.sessions[stage], lambda: None, grey)  # type: ignore[assignment]
        return pipeline

    server = serve(reopen=load)
    lost = server.submit(**SIZE)[1].wait()
    assert isinstance(lost, Refused) and "one colour" in str(lost.refusal)
    assert isinstance(server.submit(allow_uniform=True, **SIZE)[1].wait(), Finished)


def test_cancelling_ends_a_video_before_its_next_latent_frame(serve: Serve, video_bundle: Path) -> None:
    runs: list[int] = []
    decoding, go_on = threading.Event(), threading.Event()

    def before() -> None:
        runs.append(1)
        decoding.set()
        assert go_on.wait(PATIENCE)

    server = serve(reopen=opening(video_bundle, before))
    job, heard = server.submit(**SIZE)
    assert decoding.wait(PATIENCE)
    server.scheduler.cancel(job)
    go_on.set()
    assert isinstance(heard.wait(), Cancelled) and len(runs) == 1
    assert (server.scheduler.admission.requests, server.scheduler.admission.pixel_steps) == (0, 0)
    assert not server.scheduler._queue.tasks


def test_after_a_crash_another_video_is_decoded_anew(serve: Serve, video_bundle: Path) -> None:
    runs: list[int] = []

    def before() -> None:
        runs.append(1)
        if len(runs) == 3:
            raise RuntimeError("no memory")

    server = serve(reopen=opening(video_bundle, before), start=False)
    first, second = (server.submit(seed=seed, **SIZE)[1] for seed in (1, 2))
    server.scheduler.start()
    ends = [first.wait(), second.wait()]
    (crashed,) = (end for end in ends if isinstance(end, Refused))
    assert crashed.refusal.retry_after is not None
    (video,) = (end.videos[0] for end in ends if isinstance(end, Finished))
    seed = 1 if isinstance(ends[0], Finished) else 2
    expected = server.scheduler.pipeline.draw(Request(prompt="red cat", seed=seed, **SIZE)).frames[0]
    assert same(video, expected)


def test_warming_up_decodes_the_first_latent_frames_alone(video_bundle: Path) -> None:
    runs: list[int] = []
    with opening(video_bundle, lambda: runs.append(1))() as pipeline:
        times = StepTimes(1)
        warm_up(pipeline, times, seconds=0.0)
    assert len(runs) == 2
    assert times.stage_seconds(VAE_DECODER, 32 * 64 * 9) > 0


@pytest.mark.parametrize("frames", [5, 13])
def test_longer_videos_are_predicted_to_take_longer(serve: Serve, video_bundle: Path, frames: int) -> None:
    server = serve(reopen=opening(video_bundle))
    server.submit(**{**SIZE, "frames": 9})[1].wait()
    predictions, plan = server.scheduler._predictions, server.scheduler.pipeline.plan
    alone = [
        predictions.alone_seconds(plan(Request(prompt="red cat", seed=3, **{**SIZE, "frames": count})))
        for count in (frames, frames + 4)
    ]
    assert 0 < alone[0] < alone[1]
