"""The GPU benchmark, run on a CPU in place of the GPU: its candidates, its comparisons, and how it handles failures."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_candidates
from benchmarks.full_size import CASES, Case, transformer
from ditc.runtime.spec import Precision

TINY = transformer(1, 2, 2, qk_norm=False)
CEILING = {"matmul_flops": 1e12, "copy_bytes_per_s": 1e11}
compile_for_real = torch.compile


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make the CPU the device, and return the input shapes of everything that torch.compile compiles."""
    found: list[Any] = []

    def note(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append([tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in inputs])
        return graph.forward

    monkeypatch.setitem(CASES, "tiny", Case("denoiser", "transformer", TINY, "fp16"))
    monkeypatch.setattr(gpu_candidates, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_candidates, "wait_for_torch", lambda: None)
    monkeypatch.setattr(gpu_candidates, "PRECISIONS", (Precision.FP16,))
    monkeypatch.setattr(gpu, "BATCHES", (1, 2))
    monkeypatch.setattr(
        torch, "compile", lambda run, *, mode, dynamic: compile_for_real(run, backend=note, dynamic=dynamic)
    )
    return found


def test_every_candidate_is_compared_with_fp32_and_compiled_for_each_batch(compiled: list[Any]) -> None:
    results = gpu.compare("tiny", 64, repeats=2, ceiling=CEILING)
    errors = {label: rows[1].get("relative_l2_of_fp32") for label, rows in results.items() if 1 in rows}
    assert errors["diffusers fp32"] == 0
    # Errors are not zero, and small. The CPU provider computes fp16 graphs in fp32, so our error is smaller.
    for label, least in (("diffusers bf16", 1e-4), ("torch.compile bf16", 1e-4), ("onnxruntime fp16", 1e-8)):
        assert least < errors[label] < 0.02, label
        assert results[label][2]["latency_s"]["median"] > 0
    # No engine runs here. Each is listed as failed, and the other candidates are still measured.
    assert all("failed" in rows for label, rows in results.items() if label.startswith("tensorrt"))
    # One graph is compiled per batch size, for two guidance rows per picture. None has a dynamic batch.
    latents = [shape for shapes in compiled for shape in shapes if len(shape) == 4]
    assert latents[0] == (2, 32, 2, 2) and (4, 32, 2, 2) in latents
    assert all(isinstance(size, int) for shapes in compiled for shape in shapes for size in shape)
    assert "| tiny 64px | diffusers fp32 |" in gpu.table({"tiny 64px": results})


def test_a_candidate_that_fails_is_recorded_and_freed(compiled: list[Any]) -> None:
    class Network:
        """Stands for the network that a candidate keeps alive."""

    alive: list[weakref.ref[Network]] = []

    def build(batch: int) -> gpu_candidates.Candidate:
        assert not any(network() for network in alive)
        network = Network()
        network.itself = network  # type: ignore[attr-defined]  # a cycle, as modules have them
        alive.append(weakref.ref(network))
        return gpu_candidates.Candidate(lambda: network, lambda: None, lambda: np.empty(0))

    def rate(candidate: gpu_candidates.Candidate, batch: int) -> dict[str, Any]:
        if batch == 2:
            raise MemoryError("no more\nat all")
        return {"batch": batch}

    assert gpu.over_batches(build, rate) == {1: {"batch": 1}, 2: {"failed": "MemoryError: no more"}}
    assert not any(network() for network in alive)


def test_it_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu, "find_gpu", lambda: None)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
