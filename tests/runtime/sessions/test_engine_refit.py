"""TensorRT's backend opens an engine with other weights on the device that the stages share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeCuda, FakeEngine

from ditc.runtime.bundle.golden import read_golden
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.session import to_numpy
from ditc.runtime.sessions import tensorrt_backend
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.sessions.registry import row_of
from ditc.runtime.spec import VAE_DECODER, Backend
from ditc.runtime.weight_map import read_weight_map


def test_the_engine_computes_with_the_given_weights(tiny_bundle: Path, monkeypatch) -> None:
    manifest = load_manifest(tiny_bundle)
    stage, scale = manifest.stages[VAE_DECODER], manifest.latents.scale_factor
    artifact, golden = stage.artifacts[0], stage.golden
    model, device = tiny_bundle / artifact.file.path, Device(FakeCuda())
    engine = FakeEngine(device.cuda, model, artifact.spec, scale=scale)
    monkeypatch.setattr(tensorrt_backend, "TensorRTEngine", lambda *arguments, **options: replace(engine))
    monkeypatch.setattr(tensorrt_backend, "open_device", lambda: pytest.fail("a second device was opened"))
    assert artifact.weights is not None and golden is not None
    weights = read_weight_map(tiny_bundle / artifact.weights.path)
    bias = next(w for w in weights if w.checkpoint == "decoder.conv_out.bias")
    changed = {bias.initializer: np.full(bias.stored_shape, 0.25, np.float32)}
    row, options = row_of(Backend.TENSORRT), LoadOptions()
    feeds = read_golden(tiny_bundle / golden.path).inputs
    name, outputs = artifact.spec.outputs[0].name, []
    for given in ({}, changed):
        open_it = tensorrt_backend.open_changed if given else tensorrt_backend.open_stage
        session = open_it(row, model, artifact, options, device, *([given] if given else []))
        outputs.append(np.array(to_numpy(session.run(feeds)[name])))
        session.close()
    plain = OnnxRuntimeSession(
        model, artifact.spec, precision=artifact.precision, provider=CPU, threads=1, weights=changed
    )
    np.testing.assert_allclose(outputs[1], to_numpy(plain.run(feeds)[name]), atol=1e-5)
    assert np.abs(outputs[1] - outputs[0]).max() > 0.1
