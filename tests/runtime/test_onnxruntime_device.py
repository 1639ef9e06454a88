"""IO binding over the CPU's memory: what the CUDA session does, with the CPU provider under it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditc.runtime import denoise
from ditc.runtime.errors import SessionError
from ditc.runtime.manifest import load_manifest
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import to_numpy
from ditc.runtime.sessions.onnxruntime_device import MAX_GRAPHS, OnnxRuntimeDeviceSession, OrtTensor
from ditc.runtime.spec import DENOISER

SETTINGS: dict[str, Any] = {"num_inference_steps": 4, "height": 64, "width": 64, "seed": 3}


def bound(bundle: Path, *, graphs: bool) -> OnnxRuntimeDeviceSession:
    artifact = load_manifest(bundle).stages[DENOISER].artifacts[0]
    path = bundle / artifact.file.path
    return OnnxRuntimeDeviceSession(path, artifact.spec, device="cpu", threads=1, graphs=graphs)


@pytest.mark.parametrize("graphs", [False, True])
def test_every_state_is_that_of_the_plain_session(
    tiny_bundle: Path, pipeline: Pipeline, graphs: bool
) -> None:
    session = bound(tiny_bundle, graphs=graphs)
    for seed in (3, 4):
        (state,) = pipeline.start(pipeline.plan(Request(prompt="red cat", **{**SETTINGS, "seed": seed})))
        other, kept = state, []
        while not state.done:
            (state,) = denoise.step(session, [state])
            (other,) = denoise.step(pipeline.sessions[DENOISER], [other])
            assert isinstance(state.latents, OrtTensor)
            kept.append((state, other))
        for mine, plain in kept:  # results of earlier steps are values: nothing wrote over them
            for name in ("latents", "history", "x0", "stats"):
                assert np.array_equal(to_numpy(getattr(mine, name)), to_numpy(getattr(plain, name))), name
    session.close()


def test_the_number_of_graphs_is_bounded_and_further_shapes_run_without(
    tiny_bundle: Path, pipeline: Pipeline
) -> None:
    session = bound(tiny_bundle, graphs=True)
    for width in range(32, 32 + 4 * (MAX_GRAPHS + 2), 4):
        plan = pipeline.plan(Request(prompt="red cat", **{**SETTINGS, "width": width}))
        (state,) = pipeline.start(plan)
        for _ in range(2):
            (result,) = denoise.step(session, [state])
        (expected,) = denoise.step(pipeline.sessions[DENOISER], [state])
        assert np.array_equal(to_numpy(result.latents), to_numpy(expected.latents))
    assert len(session._graphs) == MAX_GRAPHS
    session.close()


def test_a_wrong_shape_is_a_session_error(tiny_bundle: Path, pipeline: Pipeline) -> None:
    session = bound(tiny_bundle, graphs=False)
    (state,) = pipeline.start(pipeline.plan(Request(prompt="red cat", **SETTINGS)))
    with pytest.raises(SessionError, match="denoiser: "):
        denoise.step(session, [replace(state, latents=np.zeros((1, 3, 8, 8), np.float32))])
    session.close()
