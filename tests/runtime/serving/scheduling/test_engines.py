"""The scheduler over engines on a fake GPU, with its two threads: pictures, copies, memory and faults.

The fake computes with ONNX Runtime's CPU kernels in one thread, so every picture must be the one that `Pipeline` draws
alone with ONNX Runtime, bit for bit (test_invariance.py says why). What pads a batch must change nothing.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_pipeline import Gpu
from serving_scheduler import PATIENCE, Heard, Serve, Server

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import make_plan
from ditc.runtime.serving.scheduling.batches import Batches
from ditc.runtime.serving.scheduling.job import Cancelled, Event, Finished, Job, Picture, Progress, Refused
from ditc.runtime.serving.scheduling.scheduler import Scheduler
from ditc.runtime.session import ComputeDevice
from ditc.runtime.sessions.residency import OnDemandSession, Residency
from ditc.runtime.spec import DENOISER

from .mixes import Alone, drawn_alone, variants


class OnGpu:
    """A server over engines on fake GPUs; a new one is opened after a crash."""

    def __init__(self, serve: Serve, bundle: Path, **options: Any) -> None:
        self.opened: list[Gpu] = []

        def load() -> Pipeline:
            self.opened.append(Gpu(bundle))
            return self.opened[-1].pipeline

        self.server: Server = serve(reopen=load, batches_pay=True, **options)
        self.scheduler: Scheduler = self.server.scheduler

    @property
    def gpu(self) -> Gpu:
        return self.opened[-1]

    def submit(self, alone: Alone, *, then: Any = None) -> tuple[Job, Heard]:
        plan = make_plan(
            alone.request, self.scheduler.pipeline.drawable
        )  # as `Model.plan`, also after a crash
        heard = Heard()

        def listen(event: Event) -> None:
            heard(event)
            if then is not None:
                then(event)

        return self.scheduler.submit(plan, listen, id="same"), heard


@pytest.fixture(scope="module")
def known(tiny_bundle: Path) -> Iterator[list[Alone]]:
    with Pipeline.load(tiny_bundle, threads=1) as pipeline:
        yield [drawn_alone(pipeline, request) for request in variants(random.Random(5), 12, (32, 64))]


def equals(end: Finished, alone: Alone) -> bool:
    return all(map(np.array_equal, map(np.asarray, end.images), alone.pictures))


def test_requests_join_leave_and_are_cancelled_and_each_gets_its_picture(
    serve: Serve, tiny_bundle: Path, known: list[Alone]
) -> None:
    """They differ in prompts, sizes, steps and guidance. Two threads work, so their order differs between runs."""
    on, rng = OnGpu(serve, tiny_bundle), random.Random(0)
    assert on.scheduler.overlaps
    for _ in range(10):
        entries: list[tuple[Alone, Job, Heard]] = []
        for _ in range(rng.randint(2, 7)):
            alone = rng.choice(known)
            entries.append((alone, *on.submit(alone)))
            if rng.random() < 0.3:
                entries[-1][2].wait_for_anything()
            if rng.random() < 0.2:
                on.scheduler.cancel(rng.choice(entries)[1])
        for alone, job, heard in entries:
            end = heard.wait()
            assert isinstance(end, Finished) or (job.cancelled and isinstance(end, Cancelled))
            assert isinstance(end, Cancelled) or equals(end, alone), alone.request
    assert len({plan.inputs for plan in on.gpu.denoiser._loops}) > 4, "graphs for several sizes of batches"


def steps_of(alone: Alone) -> int:
    return int(alone.request.num_inference_steps or 0) * alone.request.num_pictures


def test_a_steady_step_is_one_launch_one_upload_and_one_download(serve: Serve, tiny_bundle: Path) -> None:
    """No graph is captured, no text is copied, and nothing is allocated. The download has the statistics."""
    on = OnGpu(serve, tiny_bundle, start=False)
    calls, step = on.gpu.cuda.calls, on.scheduler._work.batches.step
    in_steps: list[Counter[str]] = []

    def counted(key: Any, states: Any) -> Any:
        with on.gpu.device.lock:  # so that the other thread's calls are not counted
            before = len(calls)
            stepped = step(key, states)
            in_steps.append(Counter(calls[before:]))
        return stepped

    on.scheduler._work.batches.step = counted  # type: ignore[method-assign]
    heard = on.server.submit(num_inference_steps=8)[1]
    on.scheduler.start()
    heard.wait()
    assert in_steps[0]["launch"] == 0 and in_steps[1]["begin_capture"] == 1
    carried, results = 2, 4
    steady = Counter(upload=1, copy=carried + results, launch=1, download=1, synchronize=1)
    assert in_steps[2:] == [steady] * 6


def test_texts_leave_the_device_with_the_last_picture_of_their_size(
    serve: Serve, tiny_bundle: Path, known: list[Alone]
) -> None:
    on = OnGpu(serve, tiny_bundle)
    used = []
    for _ in range(4):
        for alone in known[:4]:
            on.submit(alone)[1].wait()
        wait_until(lambda: not on.scheduler._work.batches._batches)
        gc.collect()
        used.append(on.gpu.device.allocated_bytes)
    assert used[-1] == used[-2], used


def test_pictures_that_wait_for_the_decoder_keep_neither_texts_nor_memory_of_the_device(
    serve: Serve, tiny_bundle: Path
) -> None:
    """With few steps and a slow decoder, all pictures of a long queue wait there."""
    on = OnGpu(serve, tiny_bundle)
    decode, states = on.scheduler._work.decode, []

    def watched(picture: Picture) -> None:
        states.append(picture.state)
        decode(picture)

    on.scheduler._work.decode = watched  # type: ignore[method-assign]
    assert isinstance(on.server.draw(num_images_per_prompt=3, previews=1), Finished)
    assert len(states) == 3
    for state in states:
        assert isinstance(state.latents, np.ndarray) and state.latents.base is None
        assert not state.rows.conditioning and state.x0 is None and not state.schedule


def wait_until(true: Any) -> None:
    waited = threading.Event()
    for _ in range(int(PATIENCE * 100)):
        if true():
            return
        waited.wait(0.01)
    raise AssertionError("it did not become true")


def test_a_crash_ends_requests_with_states_on_the_device_and_no_others(
    serve: Serve, tiny_bundle: Path, known: list[Alone]
) -> None:
    on = OnGpu(serve, tiny_bundle, max_batch=1, start=False)
    step, runs = on.scheduler._work.batches.step, []

    def failing(key: Any, states: Any) -> Any:
        runs.append(len(states))
        if len(runs) == 3:
            raise RuntimeError("planted")
        return step(key, states)

    on.scheduler._work.batches.step = failing  # type: ignore[method-assign]
    lost = on.server.submit(num_images_per_prompt=2, num_inference_steps=4)[1]
    others = [on.submit(alone)[1] for alone in known[:3]]
    on.scheduler.start()
    assert isinstance(lost.wait(), Refused)
    for alone, heard in zip(known, others, strict=False):
        assert equals(heard.wait(), alone)
    assert len(on.opened) == 2, "opened again once"


def test_pictures_whose_texts_are_encoded_after_a_crash_use_the_bundle_that_was_opened_again(
    serve: Serve, tiny_bundle: Path
) -> None:
    """The texts of a request are encoded one at a time, so a crash may fall between two of them."""
    on = OnGpu(serve, tiny_bundle, start=False)
    scheduler = on.scheduler
    job, heard = on.server.submit(num_images_per_prompt=3, num_inference_steps=2)
    with scheduler._wake:
        first = scheduler._queue.take_task(scheduler._best_size)
    assert first is not None
    first.action()
    scheduler._session_crashed(RuntimeError("planted"), [])
    scheduler.start()
    end = heard.wait()
    assert isinstance(end, Finished) and len(on.opened) == 2
    alone = scheduler.pipeline.draw(job.plan.request).images
    assert all(map(np.array_equal, map(np.asarray, end.images), map(np.asarray, alone)))


def test_a_listener_may_cancel_while_the_other_thread_ends_the_same_request(
    serve: Serve, tiny_bundle: Path, known: list[Alone]
) -> None:
    """A job tells its listener under its lock; had the scheduler held its own for that, both would wait for ever."""
    on = OnGpu(serve, tiny_bundle)
    for alone in known * 2:
        jobs: list[Job] = []

        def cancel(event: Event, jobs: list[Job] = jobs) -> None:
            if isinstance(event, Progress):
                for job in jobs:
                    on.scheduler.cancel(job)

        pairs = [on.submit(alone, then=cancel) for _ in range(2)]
        jobs += [job for job, _ in pairs]
        for _, heard in pairs:
            heard.wait()
    assert on.scheduler.problem == "" and on.scheduler.idle


def test_stages_that_replace_each_other_in_memory_are_run_by_one_thread(
    serve: Serve, tiny_bundle: Path, known: list[Alone]
) -> None:
    gpu, residency, opened = Gpu(tiny_bundle), Residency(), Counter[str]()
    there = ComputeDevice(kind="cuda", name="fake")

    def on_demand(name: str, session: Any) -> OnDemandSession:
        def open_it() -> Any:
            opened[name] += 1
            return Gpu(tiny_bundle, gpu.cuda).pipeline.sessions[name]

        return OnDemandSession(session.spec, open_it, residency, device=there)

    lazy = {name: on_demand(name, session) for name, session in gpu.pipeline.sessions.items()}
    pipeline = gpu.pipeline.with_sessions(lazy, owned=True)
    server = serve(reopen=lambda: pipeline)
    assert not server.scheduler.overlaps
    alone = next(each for each in known if steps_of(each) > 2)
    heard = Heard()
    server.scheduler.submit(pipeline.plan(alone.request), heard, id="one")
    assert equals(heard.wait(), alone)
    assert opened[DENOISER] == 1, "it stays in memory during its steps"


def test_requests_with_equal_ids_have_an_end_each(
    serve: Serve, tiny_bundle: Path, known: list[Alone]
) -> None:
    on = OnGpu(serve, tiny_bundle, start=False)
    both = [on.submit(alone) for alone in known[:2]]
    on.scheduler.start()
    for alone, (_, heard) in zip(known, both, strict=False):
        assert equals(heard.wait(), alone)


def test_clients_in_threads_that_cancel_while_sessions_crash_lose_nothing(
    serve: Serve, tiny_bundle: Path, known: list[Alone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request has one end, every picture is right, and the memory of every device is given back."""
    planted, step = random.Random(1), Batches.step

    def step_or_crash(self: Batches, key: Any, states: Any) -> Any:
        if planted.random() < 0.03:
            raise RuntimeError("planted")
        return step(self, key, states)

    monkeypatch.setattr(Batches, "step", step_or_crash)
    on, counts = OnGpu(serve, tiny_bundle), Counter[type]()

    def client(number: int) -> Counter[type]:
        rng, ended = random.Random(number), Counter[type]()
        for _ in range(10):
            alone = rng.choice(known)
            job, heard = on.submit(alone)
            if rng.random() < 0.3:
                heard.wait_for_anything()
                on.scheduler.cancel(job)
            end = heard.wait()
            ended[type(end)] += 1
            assert not isinstance(end, Finished) or equals(end, alone)
        return ended

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads interrupt each other often
    try:
        with ThreadPoolExecutor(4) as pool:
            for ended in pool.map(client, range(4)):
                counts += ended
    finally:
        sys.setswitchinterval(interval)
    assert sum(counts.values()) == 40 and counts[Finished] and len(on.opened) > 1
    on.scheduler.close()
    gc.collect()
    assert [gpu.cuda.used() for gpu in on.opened] == [0] * len(on.opened)
