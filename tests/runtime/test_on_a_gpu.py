"""What only a GPU can show. None of it has been run by us: no GPU that TensorRT-RTX serves was at hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditc.runtime.gpu import NO_GPU, find_gpu
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.sessions import missing, open_device
from ditc.runtime.spec import Backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_gpu() is None, reason=NO_GPU),
]
SETTINGS: dict[str, Any] = {
    "num_inference_steps": 5,
    "height": 64,
    "width": 64,
    "seed": 3,
    "output_type": "np",
}
# fp32 engines beside ONNX Runtime in fp32: other orders of summation, over 5 steps and the decoder.
PSNR_DB = 50.0


@pytest.fixture(scope="module", params=[Backend.TENSORRT, Backend.TENSORRT_RTX])
def engines(
    request: pytest.FixtureRequest, tiny_bundle: Path, tiny_checkpoint: Path
) -> Iterator[tuple[Path, str]]:
    backend, gpu = request.param, find_gpu()
    if lack := missing(backend):
        pytest.skip(lack)
    from ditc.export.bundle import build_bundle
    from ditc.export.engines.targets import RTX_TARGETS
    from ditc.export.stages import BuildOptions

    assert gpu is not None
    if backend is Backend.TENSORRT_RTX and gpu.sm not in RTX_TARGETS:
        pytest.skip(f"TensorRT-RTX builds nothing for {gpu.sm}")
    out = tiny_bundle.parent / f"bundle-{backend.value}"
    shutil.copytree(tiny_bundle, out)
    targets = (gpu.sm,) if backend is Backend.TENSORRT_RTX else ()
    build_bundle(tiny_checkpoint, out, BuildOptions(backend=backend, targets=targets))
    yield out, backend.value


def test_engines_draw_what_onnx_runtime_draws(engines: tuple[Path, str], pipeline: Pipeline) -> None:
    bundle, backend = engines
    expected = np.asarray(pipeline.draw(Request(prompt="red cat", **SETTINGS)).images)
    for low_vram in (False, True):
        with Pipeline.load(bundle, backend=backend, low_vram=low_vram) as ours:
            for steps_per_launch in (
                1,
                2,
                None,
                None,
            ):  # plain, chunks, the whole loop, the whole loop as a graph
                ours.steps_per_launch = steps_per_launch
                images = np.asarray(ours.draw(Request(prompt="red cat", **SETTINGS)).images)
                error = float(np.mean((images - expected) ** 2))
                assert 10 * np.log10(1 / max(error, 1e-12)) >= PSNR_DB, (low_vram, steps_per_launch)


def test_cuda_calls_do_what_the_fake_does() -> None:
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
    from ditc.export.ops.relu_linear_attention.reference import relu_linear_attention_reference
    from ditc.export.ops.relu_linear_attention.torch_op import DIFFUSERS_EPS, relu_linear_attention
    from ditc.export.ops.relu_linear_attention.triton_op import (
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
