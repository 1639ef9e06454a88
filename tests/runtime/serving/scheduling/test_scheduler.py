"""Requests from their acceptance to their one end: pictures, cancelling, deadlines, faults, and what is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from serving_scheduler import PATIENCE, SETTINGS, Serve, Server

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.serving.refusals import Overloaded, TooLate, Unavailable
from ditc.runtime.serving.scheduling import scheduler as scheduler_module
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.scheduling.job import (
    Cancelled,
    Event,
    Finished,
    Preview,
    Progress,
    Refused,
    preview_steps,
)
from ditc.runtime.serving.scheduling.scheduler import Scheduler
from ditc.runtime.session import Array, Tensor
from ditc.runtime.spec import DENOISER
from ditc.runtime.step_contract import STATS, X0


def pixels(end: Finished) -> list[Array]:
    return [np.asarray(image) for image in end.images]


def alone(server: Server, **changes: object) -> list[Array]:
    request = Request(**{"prompt": "red cat", **SETTINGS, **changes})  # type: ignore[arg-type]
    return [np.asarray(image) for image in server.scheduler.pipeline.draw(request).images]


def nothing_is_left(server: Server) -> bool:
    scheduler = server.scheduler
    counts = (scheduler.admission.requests, scheduler.admission.pixel_steps)
    return (
        scheduler.idle and counts == (0, 0) and not scheduler._queue.pictures and not scheduler._queue.tasks
    )


class Spy:
    """A denoiser that calls a function before every run, which may raise or change the results."""

    def __init__(self, inner, before: Callable[[Mapping[str, Tensor]], None], after=lambda outputs: outputs):
        self.inner, self.before, self.after = inner, before, after
        self.spec, self.device = inner.spec, inner.device

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.before(feeds)
        return self.after(self.inner.run(feeds))

    def close(self) -> None:
        self.inner.close()


def watched(bundle: Path, before: Callable[[Mapping[str, Tensor]], None], after=lambda outputs: outputs):
    """Opens pipelines whose denoiser is a spy."""

    def load() -> Pipeline:
        pipeline = Pipeline.load(bundle, threads=1)
        pipeline.sessions[DENOISER] = Spy(pipeline.sessions[DENOISER], before, after)  # type: ignore[assignment]
        return pipeline

    return load


def test_pictures_are_those_of_the_pipeline_and_progress_counts_every_step(serve: Serve) -> None:
    server = serve()
    _, heard = server.submit(num_images_per_prompt=2)
    end = heard.wait()
    assert all(map(np.array_equal, pixels(end), alone(server, num_images_per_prompt=2)))
    assert heard.steps == [1, 2, 3, 4, 5, 6]
    assert {event.total for event in heard.events if isinstance(event, Progress)} == {6}
    assert end.seconds.keys() == {"wait", "text", "denoise", "decode", "total"}
    assert nothing_is_left(server)


def test_previews_come_between_the_steps_and_are_as_many_as_asked_for(serve: Serve) -> None:
    server = serve()
    _, heard = server.submit(num_inference_steps=6, previews=2)
    heard.wait()
    previews = [event for event in heard.events if isinstance(event, Preview)]
    assert [(event.number, event.step) for event in previews] == [(0, 2), (1, 4)]
    assert previews[0].image.size == tuple(reversed(previews[0].image.size))


@pytest.mark.parametrize(("runs", "count"), [(1, 3), (2, 3), (4, 3), (50, 1), (50, 3), (3, 0)])
def test_steps_of_previews_are_spread_and_begin_after_the_first_step(runs: int, count: int) -> None:
    steps = preview_steps(runs, count)
    assert all(1 <= step <= runs for step in steps) and len(steps) <= count
    assert list(steps.values()) == sorted(steps.values())


def test_requests_share_a_run_where_batches_pay(serve: Serve, tiny_bundle: Path) -> None:
    sizes: list[int] = []
    load = watched(tiny_bundle, lambda feeds: sizes.append(feeds["latents"].shape[0]))
    server = serve(reopen=load, batches_pay=True, start=False)
    heard = [server.submit(seed=seed)[1] for seed in (1, 2)]
    server.scheduler.start()
    ends = [one.wait() for one in heard]
    assert sizes == [2, 2, 2]
    for seed, end in zip((1, 2), ends, strict=True):
        assert np.abs(pixels(end)[0].astype(int) - alone(server, seed=seed)[0]).max() <= 1


def test_a_request_of_few_steps_overtakes_one_of_many(serve: Serve) -> None:
    server = serve(start=False)
    server.scheduler.times.record(server.scheduler.pipeline and _key(server), 1, 0.01)
    ends: list[str] = []
    note = lambda name: lambda event: ends.append(name) if isinstance(event, Finished) else None  # noqa: E731
    long = server.submit(num_inference_steps=20, then=note("long"))[1]
    short = server.submit(num_inference_steps=2, then=note("short"))[1]
    server.scheduler.start()
    long.wait(), short.wait()
    assert ends == ["short", "long"]


def _key(server: Server):
    from ditc.runtime.serving.scheduling.job import batch_key

    pipeline = server.scheduler.pipeline
    (state,) = pipeline.states(pipeline.plan(Request(**{"prompt": "red cat", **SETTINGS})))
    return batch_key(state)


def test_cancelling_ends_a_request_before_its_next_step(serve: Serve, tiny_bundle: Path) -> None:
    runs = []
    at_step, go_on = threading.Event(), threading.Event()

    def before(feeds: Mapping[str, Tensor]) -> None:
        runs.append(1)
        if len(runs) == 2:
            at_step.set()
            assert go_on.wait(PATIENCE)

    server = serve(reopen=watched(tiny_bundle, before))
    job, heard = server.submit(num_inference_steps=20)
    assert at_step.wait(PATIENCE)
    server.scheduler.cancel(job)
    go_on.set()
    assert isinstance(heard.wait(), Cancelled)
    assert len(runs) == 2
    server.draw()
    assert nothing_is_left(server)


def test_a_request_that_waits_can_be_cancelled_and_never_begins(serve: Serve) -> None:
    server = serve(start=False)
    job, heard = server.submit()
    server.scheduler.cancel(job)
    server.scheduler.start()
    assert isinstance(heard.wait(), Cancelled)
    assert heard.steps == [] and job.began is None
    assert nothing_is_left(server)


def test_a_deadline_that_cannot_be_met_is_refused_at_once(serve: Serve) -> None:
    server = serve(start=False)
    server.scheduler.times.record(_key(server), 1, 1.0)
    with pytest.raises(TooLate, match=r"about 3\.0 s, and its timeout is 2 s"):
        server.submit(timeout=2)
    assert nothing_is_left(server)


def test_a_deadline_that_passes_ends_the_request(serve: Serve, tiny_bundle: Path) -> None:
    now = [0.0]

    def before(feeds: Mapping[str, Tensor]) -> None:
        now[0] += 1

    server = serve(reopen=watched(tiny_bundle, before), start=False, clock=lambda: now[0])
    _, heard = server.submit(num_inference_steps=9, timeout=4.5)
    server.scheduler.start()
    end = heard.wait()
    assert isinstance(end, Refused) and isinstance(end.refusal, TooLate)
    assert len(heard.steps) == 5
    assert nothing_is_left(server)


def test_a_full_queue_refuses_and_has_room_again_later(serve: Serve) -> None:
    server = serve(bounds=Bounds(requests=2), start=False)
    heard = [server.submit()[1] for _ in range(2)]
    with pytest.raises(Overloaded):
        server.submit()
    server.scheduler.start()
    for one in heard:
        one.wait()
    server.draw()


def test_a_picture_with_nan_fails_alone_and_names_stage_and_step(serve: Serve, tiny_bundle: Path) -> None:
    runs: list[int] = []

    def spoil(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        runs.append(1)
        if len(runs) == 2:  # the second step of the first of the two pictures
            stats, x0 = np.array(outputs[STATS]), np.array(outputs[X0])
            stats[0], x0[0] = (7, 1), np.nan
            return {**outputs, STATS: stats, X0: x0}
        return outputs

    server = serve(reopen=watched(tiny_bundle, lambda feeds: None, spoil), batches_pay=True, start=False)
    bad, good = server.submit(seed=1)[1], server.submit(seed=2)[1]
    server.scheduler.start()
    refused, end = bad.wait(), good.wait()
    assert isinstance(refused, Refused) and refused.refusal.status == 500
    assert "denoiser: step 2 of 3" in str(refused.refusal)
    assert np.abs(pixels(end)[0].astype(int) - alone(server, seed=2)[0]).max() <= 1


def test_a_crash_fails_only_its_batch_and_the_bundle_is_opened_again(serve: Serve, tiny_bundle: Path) -> None:
    opened, runs = [], []

    def before(feeds: Mapping[str, Tensor]) -> None:
        runs.append(feeds["latents"].shape[-2:])
        if len(runs) == 2:
            raise RuntimeError("planted")

    load = watched(tiny_bundle, before)
    server = serve(reopen=lambda: opened.append(1) or load(), start=False)
    first = server.submit(seed=1)[1]
    other = server.submit(seed=2)[1]
    server.scheduler.start()
    refused = first.wait()
    assert isinstance(refused, Refused) and refused.refusal.status == 500
    assert "planted" not in str(refused.refusal)
    assert np.array_equal(pixels(other.wait())[0], alone(server, seed=2)[0])
    assert len(opened) == 2 and server.scheduler.problem == ""
    assert nothing_is_left(server)


def test_a_pipeline_whose_variants_fail_when_the_bundle_is_opened_again_is_closed(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "REOPEN_PAUSES", (0.0,))
    opened, runs = list[Pipeline](), list[int]()

    def before(feeds: Mapping[str, Tensor]) -> None:
        runs.append(1)
        if len(runs) == 1:
            raise RuntimeError("planted")

    def variants(pipeline: Pipeline) -> Mapping[str, Pipeline]:
        opened.append(pipeline)
        if len(opened) == 2:
            raise RuntimeError("planted, too")
        return {}

    load = watched(tiny_bundle, before)
    server = Server(Scheduler(load(), admission=Admission(Bounds()), reopen=load, variants=variants))
    try:
        first, other = (server.submit(seed=seed)[1] for seed in (1, 2))
        server.scheduler.start()
        assert isinstance(first.wait(), Refused)
        assert isinstance(other.wait(), Finished)  # with the third one
        assert [pipeline._closed for pipeline in opened] == [True, True, False]
    finally:
        server.scheduler.close()


def test_a_listener_that_fails_cancels_its_request_alone(serve: Serve) -> None:
    server = serve()

    def broken(event: Event) -> None:
        raise RuntimeError("the event loop is closed")

    server.submit(num_inference_steps=20, then=broken)
    assert len(server.draw(seed=5).images) == 1
    assert server.scheduler.problem == ""


def test_closing_ends_every_request_once_and_refuses_new_ones(serve: Serve) -> None:
    server = serve()
    heard = [server.submit(num_inference_steps=50, seed=seed)[1] for seed in range(4)]
    heard[0].wait_for_anything()
    server.scheduler.close()
    for one in heard:
        one.wait()
        assert sum(isinstance(event, Cancelled | Refused | Finished) for event in one.events) == 1
    with pytest.raises((Unavailable, Exception), match="clos"):
        server.submit()


def test_texts_are_encoded_for_few_pictures_ahead(serve: Serve) -> None:
    """The rows of a large model's text take up to 161 MB, so those of a long queue must not all be in memory."""
    server = serve(start=False, max_batch=1)
    most = []
    scheduler = server.scheduler
    original = scheduler._work.step

    def step(pictures) -> None:
        most.append(len(scheduler._queue.pictures) + len(pictures))
        original(pictures)

    scheduler._work.step = step  # type: ignore[method-assign]
    heard = [server.submit(seed=seed, num_images_per_prompt=4)[1] for seed in range(4)]
    scheduler.start()
    for one in heard:
        one.wait()
    assert max(most) <= 3
