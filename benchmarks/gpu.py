"""How fast are the engines on a GPU, compared with diffusers eager and torch.compile on the same weights in one run?

    python -m benchmarks.gpu --models sana-0.6b sana-1.6b dc-ae --sizes 512 1024

For each model, size and batch it measures
  - the latency of one call (a guided denoiser step, or a decode) and the host time until the call returns,
  - pictures per second and peak memory,
  - relative L2 against fp32: diffusers' against diffusers, ours against the same network and step in PyTorch,
  - the share of the GPU's peak, which is measured in the same run with a copy and a matrix product.
With --bundle it also times whole pictures, with and without the loop graph. Weights are random, at full width. What
cannot run is listed with the reason. The result is written to results/<gpu>-<date>.json. Without a GPU the exit code is
2. The benchmark has never been run on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.full_size import CASES
from benchmarks.gpu_candidates import (
    BATCHES,
    Candidate,
    Ours,
    checkpoint,
    clear,
    session_candidate,
    torch_candidates,
)
from benchmarks.machine import spread, write
from ditc.runtime.errors import DitcError
from ditc.runtime.gpu import find_gpu, no_gpu
from ditc.runtime.session import Array, Session
from ditc.runtime.sessions.registry import rows
from ditc.runtime.spec import DENOISER


def measured(candidate: Candidate, *, warmup: int, repeats: int) -> dict[str, Any]:
    """Latency until the GPU is done, and host time until the call returns, both in seconds."""
    for _ in range(warmup):
        candidate.call()
    candidate.wait()
    latency, host = [], []
    for _ in range(repeats):
        before = perf_counter()
        candidate.call()
        host.append(perf_counter() - before)
        candidate.wait()
        latency.append(perf_counter() - before)
    p95 = float(np.percentile(latency, 95))
    return {"latency_s": {**spread(latency), "p95": p95}, "host_s": spread(host)}


def ceilings() -> dict[str, float]:
    """This GPU's peak rates: bytes per second of a copy (read and written), and FLOPs per second of a bf16 product."""
    import torch

    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target, square = torch.empty_like(source), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy = Candidate(lambda: target.copy_(source), torch.cuda.synchronize, lambda: np.empty(0))
    product = Candidate(lambda: square @ square, torch.cuda.synchronize, lambda: np.empty(0))
    seconds = [measured(c, warmup=5, repeats=20)["latency_s"]["median"] for c in (copy, product)]
    return {"copy_bytes_per_s": 2 * source.numel() / seconds[0], "matmul_flops": 2 * 8192**3 / seconds[1]}


def kernel_bandwidth(ceiling_bytes: float) -> dict[str, Any]:
    """Time, bandwidth and error of the linear-attention kernels at the sizes of Sana-1.6B at 1024 px.

    Bandwidth is the bytes that must be read and written at least, per second.
    """
    import torch

    from ditc.export.graph.ops.relu_linear_attention.reference import relu_linear_attention_reference
    from ditc.export.graph.ops.relu_linear_attention.torch_op import DIFFUSERS_EPS, relu_linear_attention
    from ditc.export.graph.ops.relu_linear_attention.triton_op import (
        relu_linear_attention_fused,
        relu_linear_attention_triton,
    )

    q, k, v = (torch.randn(2, 1024, 70, 32, device="cuda", dtype=torch.float16) for _ in range(3))
    exact = relu_linear_attention_reference(q[:1], k[:1], v[:1], DIFFUSERS_EPS)
    results = {}
    forms = {
        "pair": relu_linear_attention_triton,
        "fused": relu_linear_attention_fused,
        "torch": relu_linear_attention,
    }
    for name, form in forms.items():
        candidate = Candidate(
            lambda form=form: form(q, k, v, DIFFUSERS_EPS), torch.cuda.synchronize, lambda: np.empty(0)
        )
        times = measured(candidate, warmup=10, repeats=50)
        rate = 4 * q.numel() * q.element_size() / times["latency_s"]["median"]
        error = (form(q[:1], k[:1], v[:1], DIFFUSERS_EPS).double() - exact).norm() / exact.norm()
        results[name] = {
            **times,
            "bytes_per_s": rate,
            "share_of_copy": rate / ceiling_bytes,
            "relative_l2": float(error),
        }
    return results


def compare(name: str, size: int, *, repeats: int, ceiling: dict[str, float]) -> dict[str, Any]:
    """Measure all candidates of one model and size: latency at each batch, fidelity at batch 1."""
    import torch

    results: dict[str, Any] = {}
    with checkpoint(name) as directory:
        theirs, our = torch_candidates(name, directory, size), Ours(name, directory, directory.parent, size)
        first = theirs["diffusers fp32"](1)
        flops, exact = _flops(first), first.result()
        del first

        def rate(candidate: Candidate, batch: int, reference: Array) -> dict[str, Any]:
            entry = measured(candidate, warmup=5, repeats=repeats)
            if batch == 1:
                entry["relative_l2_of_fp32"] = _distance(candidate.result(), reference)
            return _rated(entry, batch, flops, ceiling)

        for label, build in theirs.items():
            results[label] = over_batches(
                build,
                lambda c, batch: rate(c, batch, exact) | {"peak_bytes": torch.cuda.max_memory_allocated()},
            )
        clear()
        exact_ours = our.exact()
        for label, open_it in our.openers().items():
            clear()
            try:
                session, device = open_it()
            except Exception as e:  # any error of a library: the other candidates must still be measured
                results[label] = {"failed": _first_line(e)}
                continue
            try:
                results[label] = _session_rows(
                    session, device, size, lambda c, batch: rate(c, batch, exact_ours)
                )
            finally:
                session.close()
    return results


def over_batches(
    build: Callable[[int], Candidate], rate: Callable[[Candidate, int], dict[str, Any]]
) -> dict[Any, Any]:
    """One row per batch size, up to the first that fails. The GPU is cleared before each candidate is built."""
    rows: dict[Any, Any] = {}
    for batch in BATCHES:
        clear()
        try:
            rows[batch] = rate(build(batch), batch)
        except Exception as e:  # every library has its own class for out-of-memory errors
            rows[batch] = {"failed": _first_line(e)}
            break
    clear()
    return rows


def _session_rows(
    session: Session, device: Any, size: int, rate: Callable[[Candidate, int], dict[str, Any]]
) -> dict[Any, Any]:
    return over_batches(
        lambda batch: session_candidate(session, device, size, batch),
        lambda c, batch: rate(c, batch) | {"peak_bytes": device.peak_bytes if device else None},
    )


def pictures(bundle: Path, *, repeats: int) -> dict[str, Any]:
    """Time whole requests of 20 steps on every backend that has an artifact in the bundle and runs on this GPU.

    Each backend runs once with the whole loop as one graph, and once step by step.
    """
    from ditc.runtime.pipeline import Pipeline
    from ditc.runtime.request import Request

    results: dict[str, Any] = {}
    for backend in [row.name for row in rows()]:
        try:
            with Pipeline.load(bundle, backend=backend) as pipeline:
                for at_once in (None, 1):
                    pipeline.steps_per_launch = at_once
                    request = Request(prompt="a red heart", num_inference_steps=20, seed=1)
                    laps = [pipeline.draw(request).seconds for _ in range(repeats + 2)][2:]
                    label = f"{backend} {'whole loop' if at_once is None else 'step by step'}"
                    total = [sum(lap.values()) for lap in laps]
                    results[label] = {
                        "chosen": pipeline.chosen,
                        "seconds": {**spread(total), "p95": float(np.percentile(total, 95))},
                        "parts": {part: spread([lap[part] for lap in laps]) for part in laps[0]},
                    }
        except DitcError as e:
            results[backend] = {"failed": str(e)}
    return results


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _flops(candidate: Candidate) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        candidate.call()
    return int(counter.get_total_flops())


def _rated(entry: dict[str, Any], batch: int, flops: int, ceiling: dict[str, float]) -> dict[str, Any]:
    seconds = entry["latency_s"]["median"]
    share = flops * batch / seconds / ceiling["matmul_flops"]
    return {**entry, "images_per_s": batch / seconds, "share_of_matmul_ceiling": share}


def _distance(found: Array, reference: Array) -> float:
    difference = found.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))


def table(results: dict[str, Any]) -> str:
    """A Markdown table for the README: one row per candidate, at batch 1."""
    lines = [
        "| model | candidate | median ms | p95 ms | host ms | rel. L2 | of ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, candidates in results.items():
        for label, batches in candidates.items():
            one = batches.get(1)
            if one is None or "failed" in one:
                why = batches.get("failed") or (one or {}).get("failed", "not run")
                lines.append(f"| {model} | {label} | not run: {why} | | | | |")
                continue
            latency, host = one["latency_s"], one["host_s"]["median"]
            lines.append(
                f"| {model} | {label} | {latency['median'] * 1e3:.2f} | {latency['p95'] * 1e3:.2f} | "
                f"{host * 1e3:.3f} | {one['relative_l2_of_fp32']:.1e} | {one['share_of_matmul_ceiling']:.0%} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    models = [
        name
        for name, case in CASES.items()
        if case.stage in (DENOISER, "vae_decoder") and case.family == "sana"
    ]
    parser.add_argument("--models", nargs="+", choices=models, default=["sana-0.6b", "sana-1.6b", "dc-ae"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--bundle", type=Path, help="also time whole pictures of this bundle")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    gpu = find_gpu()
    if gpu is None:
        print(f"benchmarks.gpu: {no_gpu()}", file=sys.stderr)
        return 2
    ceiling = ceilings()
    results: dict[str, Any] = {"gpu": f"{gpu.name} {gpu.sm}", "ceilings": ceiling}
    try:
        results["kernels"] = kernel_bandwidth(ceiling["copy_bytes_per_s"])
    except DitcError as e:
        results["kernels"] = {"failed": str(e)}
    results["models"] = {}
    file = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower())
    for name, size in itertools.product(arguments.models, arguments.sizes):
        found = compare(name, size, repeats=arguments.repeats, ceiling=ceiling)
        results["models"][f"{name} {size}px"] = found
        write(file, results)  # results so far are kept, whatever happens to the next model
    if arguments.bundle is not None:
        results["pictures"] = pictures(arguments.bundle, repeats=arguments.repeats)
    print(json.dumps(results.get("pictures", {}), indent=1))
    print(table(results["models"]))
    print(write(file, results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
