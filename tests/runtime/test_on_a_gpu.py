"""Tests that need a GPU. None of them has ever been run on one, because none was available."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditc.export.build.builder import build_bundle
from ditc.export.contract import BuildOptions
from ditc.runtime.cli import main
from ditc.runtime.gpu import find_gpu, no_gpu
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.sessions.device import open_device
from ditc.runtime.sessions.onnxruntime_cuda import cuda_lack
from ditc.runtime.sessions.registry import missing, row_of, rows
from ditc.runtime.sessions.tensorrt import TensorRTSession
from ditc.runtime.spec import DENOISER, Backend, Precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_gpu() is None, reason=no_gpu()),
]
SETTINGS: dict[str, Any] = {
    "num_inference_steps": 5,
    "height": 64,
    "width": 64,
    "seed": 3,
    "output_type": "np",
}
# fp32 engines against ONNX Runtime in fp32: sums are in another order, over 5 steps and the decoder.
PSNR_DB = 50.0


# Backends, and further build options for their bundles.
DRAWING = [
    pytest.param(Backend.ONNXRUNTIME, {}, id="onnxruntime"),
    pytest.param(Backend.TENSORRT, {}, id="tensorrt"),
    pytest.param(Backend.TENSORRT_RTX, {}, id="tensorrt-rtx"),
    pytest.param(Backend.TENSORRT_RTX, {"weight_streaming": True}, id="tensorrt-rtx-streamed"),
]
ENGINES = [row.name for row in rows() if row.same_gpu]
PROVED = [
    pytest.param(backend, {"precision": precision}, id=f"{backend.value}-{precision.value}")
    for backend in (Backend.ONNXRUNTIME, *ENGINES)
    for precision in (Precision.FP32, Precision.FP16)
] + [
    pytest.param(
        backend, {"precision": Precision.FP16, "linear_attention": "plugin"}, id=f"{backend.value}-plugin"
    )
    for backend in ENGINES
]


def built(backend: Backend, options: dict[str, Any], fp32: Path, checkpoint: Path, folder: Path) -> Path:
    """A bundle for this GPU. Skips the test, with the reason, if the backend is not available here."""
    gpu = find_gpu()
    assert gpu is not None
    row = row_of(backend)
    lack = cuda_lack() if "cuda" in row.providers else missing(backend)
    if not lack and row.targets and gpu.sm not in row.targets:
        lack = f"{row.title} builds nothing for {gpu.sm}"
    if not lack and options.get("linear_attention") == "plugin" and find_spec("triton") is None:
        lack = 'Triton is not installed: pip install "ditc[plugin]"'
    if lack:
        pytest.skip(lack)
    bundle = Path(shutil.copytree(fp32, folder / "bundle"))
    targets = (gpu.sm,) if row.targets else ()
    build_bundle(checkpoint, bundle, BuildOptions(backend=backend, targets=targets, **options))
    return bundle


@pytest.mark.parametrize(("backend", "options"), DRAWING)
def test_a_backend_draws_what_the_cpu_draws(
    backend: Backend, options: dict[str, Any], tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """With 1, 2 and all steps per launch (the second time as a CUDA graph); all stages loaded, or one at a time."""
    bundle = built(backend, options, tiny_bundle, tiny_checkpoint, tmp_path)
    with Pipeline.load(tiny_bundle, provider="cpu") as reference:
        expected = np.asarray(reference.draw(Request(prompt="red cat", **SETTINGS)).images)
    for low_vram in (False, True):
        with Pipeline.load(bundle, backend=backend.value, low_vram=low_vram) as ours:
            for steps_per_launch in (1, 2, None, None):
                ours.steps_per_launch = steps_per_launch
                images = np.asarray(ours.draw(Request(prompt="red cat", **SETTINGS)).images)
                error = float(np.mean((images - expected) ** 2))
                assert 10 * np.log10(1 / max(error, 1e-12)) >= PSNR_DB, (low_vram, steps_per_launch)
            if not low_vram:
                check_graphs(ours.sessions[DENOISER], streamed=bool(options))


def check_graphs(session: Any, *, streamed: bool) -> None:
    """Every loop (in ONNX Runtime, every step) became a CUDA graph, unless streamed weights prevent that."""
    if isinstance(session, TensorRTSession):
        said = [loop.uncapturable for loop in session._loops.values() if loop.graph is None]
        assert not said or (streamed and all(said)), said
    else:
        assert session.device.kind == "cuda" and session._graphs


@pytest.mark.parametrize(("backend", "options"), PROVED)
def test_parity_holds(
    backend: Backend, options: dict[str, Any], tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """All levels; in 16 bits the bound is 1.5 times the error of PyTorch itself."""
    bundle = built(backend, options, tiny_bundle, tiny_checkpoint, tmp_path)
    which = ["--backend", backend.value, "--precision", options["precision"].value]
    assert main(["parity", str(bundle), "--against", str(tiny_checkpoint), *which]) == 0


def test_cuda_calls_do_what_those_of_the_fake_gpu_do() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    device = open_device()
    cuda, data = device.cuda, np.arange(1024, dtype=np.float32)
    one, two = device.allocate(data.nbytes), device.allocate(data.nbytes)
    cuda.upload(one, data, device.stream)
    cuda.begin_capture(device.stream)
    cuda.copy(two, one, data.nbytes, device.stream)
    graph = cuda.end_capture(device.stream)
    cuda.launch(graph, device.stream)
    found = np.zeros_like(data)
    cuda.download(found, two, device.stream)
    device.synchronize()
    cuda.destroy_graph(graph)
    assert np.array_equal(found, data)


def test_kernels_on_the_gpu_are_no_further_from_fp64_than_the_op() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", reason='Triton is not installed: pip install "ditc[plugin]"')
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    from ditc.export.graph.ops.relu_linear_attention.reference import relu_linear_attention_reference
    from ditc.export.graph.ops.relu_linear_attention.torch_op import DIFFUSERS_EPS, relu_linear_attention
    from ditc.export.graph.ops.relu_linear_attention.triton_op import (
        relu_linear_attention_fused,
        relu_linear_attention_triton,
    )

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q, k, v = (torch.randn(2, 1030, 5, 32, device="cuda").to(dtype) for _ in range(3))
        exact = relu_linear_attention_reference(q, k, v, DIFFUSERS_EPS)
        forms = (relu_linear_attention, relu_linear_attention_triton, relu_linear_attention_fused)
        errors = [float((f(q, k, v, DIFFUSERS_EPS).double() - exact).norm() / exact.norm()) for f in forms]
        assert max(errors[1:]) <= 1.5 * errors[0], (dtype, errors)


def test_the_benchmark_runs_on_the_kernels() -> None:
    pytest.importorskip("triton", reason='Triton is not installed: pip install "ditc[plugin]"')
    script = "from benchmarks.gpu import ceilings, kernel_bandwidth as k; k(ceilings()['copy_bytes_per_s'])"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2], timeout=300)
