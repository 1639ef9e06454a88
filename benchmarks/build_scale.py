"""How many seconds and how much memory does a full-size build take on a CPU? Export and TensorRT-RTX engine.

    python -m benchmarks.build_scale sana-0.6b sana-1.6b dc-ae gemma-2-2b sana-4.8b sd3.5-medium

Each model has random weights. It is written to a temporary directory in diffusers layout, shard by shard, in the
element type of the release. It is built in its own process, whose largest resident size is reported. The graph is not
checked against PyTorch here (docs/engines.md says from which size on a build leaves that to `ditc parity`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.full_size import CASES, DEFAULTS, Case, checkpoint_around, make, tokenizers_of
from benchmarks.machine import write

if TYPE_CHECKING:
    from ditc.export.checkpoint.open import Checkpoint
    from ditc.export.contract import BuildOptions, ModelPlan
    from ditc.export.engine.build import EngineReport
    from ditc.runtime.spec import StageSpec

TARGETS = ("sm80", "sm86", "sm89", "sm120")
# Goals by model: seconds, and peak memory in bytes.
GOALS = {
    "sana-1.6b": (180, 12e9),
    "gemma-2-2b": (180, 18e9),
    "sd3.5-medium": (240, 14e9),
    "sana-video-2b": (360, 16e9),
}


def measure(name: str, directory: Path, out: Path) -> dict[str, Any]:
    """Export the stage and build its engine. Call it in a fresh process: peak memory counts the whole process."""
    import psutil

    from ditc.export.build import estimates
    from ditc.export.contract import BuildOptions
    from ditc.export.engine.build import estimate_memory_bytes
    from ditc.export.engine.memory import PeakMemory
    from ditc.export.families import find_adapter
    from ditc.runtime.spec import Backend, Precision

    case = CASES[name]
    defaults = {"height": 1024, "width": 1024, **DEFAULTS[case.family]}
    checkpoint = checkpoint_around(case, directory, tokenizers_of(case.family, out), defaults)
    denoiser = case.dtype if case.component == "transformer" else "bf16"
    options = BuildOptions(precision=Precision(denoiser), backend=Backend.TENSORRT_RTX, max_batch=1)
    plan = find_adapter(checkpoint).plan(checkpoint, options)
    precision = plan.stages[case.stage].precision
    weights = estimates.weight_bytes([checkpoint.component(case.component)], precision)
    started = perf_counter()
    with PeakMemory() as exporting:
        spec, model, export_estimate = _export(case, checkpoint, plan, options, out)
    export_s = perf_counter() - started
    before = psutil.Process().memory_info().rss
    engine_estimate = before + estimate_memory_bytes(model)
    with PeakMemory() as compiling:
        report = _build_engine(case, spec, model, plan)
    return {
        "stage": case.stage,
        "precision": precision.value,
        "weights_bytes": weights,
        "export_s": export_s,
        "export_peak_bytes": exporting.peak_bytes,
        "export_estimated_bytes": export_estimate,
        "resident_before_engine_bytes": before,
        "engine_s": report.seconds,
        "engine_peak_bytes": report.peak_memory_bytes,
        "engine_estimated_bytes": engine_estimate,
        "engine_bytes": report.size_bytes,
        "profiles": len(report.profiles),
        "library": f"{report.library} {report.version}",
        "seconds": export_s + report.seconds,
        # Imports included. Far below the seconds above, it shows that the machine was busy, not that the build is slow.
        "cpu_s": sum(psutil.Process().cpu_times()[:2]),
        "peak_bytes": max(exporting.peak_bytes, report.peak_memory_bytes),
        # Without the checkpoint's mapped pages, which the system drops when memory is short.
        "peak_anonymous_bytes": max(exporting.peak_anonymous_bytes, compiling.peak_anonymous_bytes),
    }


def _export(
    case: Case, checkpoint: Checkpoint, plan: ModelPlan, options: BuildOptions, out: Path
) -> tuple[StageSpec, Path, int]:
    """Export the stage and free its weights. Returns its spec, its ONNX file, and the estimate of its memory."""
    from ditc.export.build import estimates
    from ditc.export.checkpoint.release_memory import release_memory
    from ditc.export.families import find_adapter
    from ditc.export.graph.onnx import to_onnx

    module = find_adapter(checkpoint).load(checkpoint, plan, case.stage, options)
    spec = module.spec
    estimate = estimates.export_bytes(estimates.stage_size(module, plan.latents.scale_factor))
    files = to_onnx(module, out / f"{case.stage}.onnx", check=False)
    del module
    release_memory(checkpoint.component(case.component).files)
    return spec, files.model, estimate


def _build_engine(case: Case, spec: StageSpec, model: Path, plan: ModelPlan) -> EngineReport:
    """Build the engine beside its graph, with the profiles that `ditc build` gives it."""
    from ditc.export.engine.build import build_engine
    from ditc.export.engine.profiles import orientation_profiles
    from ditc.runtime.spec import Backend

    return build_engine(
        model,
        model.with_name(f"{case.stage}.engine"),
        spec=spec,
        backend=Backend.TENSORRT_RTX,
        targets=TARGETS,
        profiles=orientation_profiles(spec, plan.defaults, Backend.TENSORRT_RTX),
    )


def run(name: str, temporary: Path | None) -> dict[str, Any]:
    """Make, measure and remove one model. A build that fails or is killed is recorded as such."""
    folder = Path(tempfile.mkdtemp(prefix="build-scale-", dir=temporary))
    directory = folder / CASES[name].component
    directory.mkdir()
    try:
        _child("make", name, directory, folder)
        print(f"{name}: weights written", file=sys.stderr)
        try:
            result = json.loads(_child("measure", name, directory, folder).splitlines()[-1])
        except subprocess.CalledProcessError as e:
            killed = "killed: not enough memory" if e.returncode == -9 else f"exit code {e.returncode}"
            return {"failed": killed, "stderr": e.stderr[-2000:]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if name in GOALS:
        seconds, peak = GOALS[name]
        result["within_goal"] = result["seconds"] <= seconds and result["peak_bytes"] <= peak
    return dict(result)


def _child(task: str, name: str, directory: Path, out: Path) -> str:
    command = [sys.executable, "-m", "benchmarks.build_scale", "--task", task, name]
    command += ["--directory", str(directory), "--out", str(out)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Measure the named models one after the other, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", choices=CASES)
    parser.add_argument("--temporary", type=Path, help="folder for the weights: up to 30 GB for 4.8B")
    parser.add_argument("--task", choices=["make", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task == "make":
        make(arguments.models[0], arguments.directory)
    elif arguments.task == "measure":
        print(json.dumps(measure(arguments.models[0], arguments.directory, arguments.out)))
    else:
        results = {}
        for name in arguments.models:
            results[name] = run(name, arguments.temporary)
            print(name, json.dumps(results[name]), file=sys.stderr)
            print(write("build_scale", results))


if __name__ == "__main__":
    main()
