"""The exported network without the step around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.export.families import find_adapter
from ditc.export.graph.onnx import to_onnx
from ditc.export.graph.torch_session import TorchSession
from ditc.runtime.metrics import relative_l2
from ditc.runtime.sessions.onnxruntime import OnnxRuntimeSession
from ditc.runtime.spec import DENOISER, NETWORK


def test_raw_exports_the_network_that_the_step_wraps(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint, options = open_checkpoint(tiny_checkpoint), BuildOptions(raw=True)
    adapter = find_adapter(checkpoint)
    plan = adapter.plan(checkpoint, options)
    network = adapter.load(checkpoint, plan, NETWORK, options)
    step = adapter.load(checkpoint, plan, DENOISER, options)
    files = to_onnx(network, tmp_path / "network.onnx")
    feeds = example_feeds(network.spec, example_sizes(network.spec))

    (prediction,) = OnnxRuntimeSession(files.model, network.spec).run(feeds).values()

    rows = len(feeds["timestep"])
    step_feeds = {
        **feeds,
        "row_of": np.arange(rows),
        "guidance_weights": np.eye(rows, dtype=np.float32),
        # With these, x0 = 0*x + 1*pred: the step returns the network's own output.
        "coefficients": np.tile(np.float32([1, 0, 1, 0, 0, 0]), (rows, 1)),
        "history": np.zeros((rows, 1, *feeds["latents"].shape[1:]), np.float32),
    }
    x0 = TorchSession(step.module, step.spec).run(step_feeds)["x0"]
    assert relative_l2(np.asarray(prediction), np.asarray(x0)) <= 1e-5  # fp32 rounding of other kernels


def test_a_bundle_has_no_raw_network_unless_asked(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert NETWORK not in find_adapter(checkpoint).plan(checkpoint, BuildOptions()).stages
