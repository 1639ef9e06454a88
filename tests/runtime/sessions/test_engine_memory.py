"""Memory of engine sessions on a fake GPU: one shared workspace, buffers that never overlap, everything is freed."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_pipeline import SETTINGS, Gpu
from fake_gpu import FakeCuda

from ditc.runtime import denoise
from ditc.runtime.errors import SessionError
from ditc.runtime.request import Request
from ditc.runtime.session import ComputeDevice, to_numpy
from ditc.runtime.sessions.buffers import DeviceArray
from ditc.runtime.sessions.residency import OnDemandSession, Residency
from ditc.runtime.sessions.tensorrt import TensorRTSession
from ditc.runtime.spec import DENOISER, VAE_DECODER
from ditc.runtime.state import Rows


def test_stages_share_one_workspace_as_large_as_the_largest_needs(tiny_bundle: Path) -> None:
    gpu = Gpu(tiny_bundle)
    for name, engine in gpu.engines.items():
        engine.workspace = 1 << (18 + len(name) % 3)  # far more than the fake adds for the shapes
    gpu.draw()
    largest = max(engine.workspace for engine in gpu.engines.values())
    assert largest <= gpu.device.workspace[1] < 1.5 * largest
    gpu.pipeline.close()


def test_the_workspace_is_as_large_as_the_sizes_that_ran_need(gpu: Gpu, expected: Any) -> None:
    """The profile's largest size needs much more: a convolution takes 4.3 GB at 4 x 1024 x 1024, 18 MB at 64 x 64."""
    sizes = []
    for side in (32, 64, 32, 64):
        for _ in range(3):  # plain, captured, replayed
            assert np.array_equal(gpu.draw(height=side, width=side), expected(height=side, width=side))
        sizes.append(gpu.device.workspace[1])
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


def test_closing_frees_every_byte(tiny_bundle: Path) -> None:
    gpu = Gpu(tiny_bundle)
    for _ in range(2):
        gpu.draw()
    gpu.pipeline.close()
    gc.collect()
    assert gpu.cuda.used() == 0 and gpu.device.allocated_bytes == 0
    assert gpu.cuda.calls.count("destroy_stream") == 1
    assert all(engine.closed for engine in gpu.engines.values())


def test_a_second_request_allocates_nothing(gpu: Gpu) -> None:
    for _ in range(2):
        gpu.draw()
    gpu.cuda.calls.clear()
    gpu.draw(seed=9)
    assert "allocate" not in gpu.cuda.calls and "free" not in gpu.cuda.calls


def test_constant_feeds_are_sent_once_and_a_changed_array_again(gpu: Gpu) -> None:
    (state,) = gpu.pipeline.start(gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    (state,) = denoise.step(gpu.denoiser, [state])
    gpu.cuda.calls.clear()
    (state,) = denoise.step(gpu.denoiser, [state])
    small = len(state.schedule[0]) + 1  # the inputs that differ by step, and row_of
    assert gpu.cuda.calls.count("upload") == small
    name, rows = next(iter(state.rows.conditioning.items()))
    changed = np.array(rows)
    changed *= 0
    other = replace(state, rows=Rows(state.rows.row_of, {**state.rows.conditioning, name: changed}))
    one, two = (to_numpy(denoise.step(gpu.denoiser, [s])[0].x0) for s in (state, other))
    assert not np.array_equal(one, two)
    changed += 1  # the same array object with other values
    assert not np.array_equal(two, to_numpy(denoise.step(gpu.denoiser, [other])[0].x0))


def test_latents_go_to_the_decoder_on_the_device(gpu: Gpu) -> None:
    gpu.pipeline.tiling = None
    states = [step.state for step in gpu.pipeline.steps(Request(prompt="red cat", **SETTINGS))][-1:]
    gpu.cuda.calls.clear()
    gpu.pipeline.decode(states, gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    assert gpu.cuda.calls.count("upload") == 0 and gpu.cuda.calls.count("download") == 1


def test_dlpack_hands_a_tensor_out_and_takes_one_in_without_a_copy(gpu: Gpu) -> None:
    import torch

    (state,) = gpu.pipeline.start(gpu.pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    (state,) = denoise.step(gpu.denoiser, [state])
    latents = state.latents
    assert isinstance(latents, DeviceArray)
    ours, pointer = torch.from_dlpack(latents), latents.pointer
    assert ours.data_ptr() == pointer and np.array_equal(ours.numpy(), latents.numpy())
    del latents
    (after,) = denoise.step(gpu.denoiser, [replace(state, latents=ours)])
    (same,) = denoise.step(gpu.denoiser, [state])
    assert np.array_equal(to_numpy(after.latents), to_numpy(same.latents))
    kept = to_numpy(state.latents).copy()
    del state, after, same
    gc.collect()
    for _ in range(3):
        gpu.draw()
    assert np.array_equal(ours.numpy(), kept)  # torch still holds the buffer, so nothing is written into it


def test_on_demand_stages_are_loaded_one_at_a_time_and_draw_the_same(
    tiny_bundle: Path, expected: Any
) -> None:
    gpu = Gpu(tiny_bundle)
    residency, loaded, most = Residency(), [], []

    def opener(name: str) -> Any:
        def open_it() -> TensorRTSession:
            loaded.append(name)
            return TensorRTSession(replace(gpu.engines[name]), gpu.engines[name].spec, gpu.device)

        return open_it

    gpu.device.enter()
    for session in gpu.pipeline.sessions.values():
        session.close()
    there = ComputeDevice(kind="cuda", name="fake")
    lazy = {n: OnDemandSession(e.spec, opener(n), residency, device=there) for n, e in gpu.engines.items()}
    gpu.pipeline.sessions.update(lazy)
    gpu.pipeline.conditioning.conditioner = lazy["conditioner"]
    for encoder in gpu.pipeline.conditioning.encoders:
        object.__setattr__(encoder, "session", lazy[encoder.spec.stage])
    for _ in range(2):
        assert np.array_equal(gpu.draw(), expected())
        most.append([name for name, session in lazy.items() if session._inner is not None])
    assert most == [[VAE_DECODER]] * 2  # only the last stage that was used
    assert loaded.count(DENOISER) == loaded.count(VAE_DECODER) == 2  # once per request, not once per step
    gpu.pipeline.close()
    gpu.device.leave()
    gc.collect()
    assert gpu.cuda.used() == 0


def test_out_of_memory_is_an_error(tiny_bundle: Path) -> None:
    with pytest.raises(SessionError, match="out of GPU memory"):
        Gpu(tiny_bundle, FakeCuda(total_bytes=1 << 16)).draw()
