"""Does the estimate of a build's memory hold? Peak and estimate of each stage of released size, in its own process.

    python -m benchmarks.build_memory [--models dc-ae clip-g ...] [--repeats 2] [--temporary DIR] [--lock FILE]

Each model has random weights (benchmarks.full_size). A stage is built as `ditc build` builds it: its weights are read
and checked, its graph is exported and compared with PyTorch where it is small enough, and its golden file is computed.
The peak is the kernel's VmHWM, without what the benchmark itself needs beforehand. A stage whose fp32 weights exceed
the free memory gets an estimate alone. The result is written after each model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.full_size import CASES, DEFAULTS, checkpoint_around, headers_around, make, tokenizers_of
from benchmarks.machine import reset_peak, write

if TYPE_CHECKING:
    from ditc.export.build.context import BuildContext
    from ditc.export.checkpoint.open import Checkpoint

LOWEST, HIGHEST = 1.0, 1.25  # the estimate divided by the peak


def main() -> None:
    """Measure the named models one after the other, and write the results after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES, metavar="MODEL")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "16-bit"], choices=["fp32", "16-bit"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--temporary", type=Path, help="folder for weights and graphs: up to 30 GB")
    parser.add_argument(
        "--lock", type=Path, help="file to lock during each measurement, if others measure too"
    )
    parser.add_argument("--task", choices=["make", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    (name, *_), (precision, *_) = arguments.models, arguments.precisions
    if arguments.task == "make":
        make(name, arguments.directory)
    elif arguments.task == "measure":
        print(json.dumps(measure(name, precision, arguments.directory)))
    else:
        results: dict[str, Any] = {}
        for name in arguments.models:
            results |= run(name, arguments)
            print(write("build_memory", results))


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make one model, measure it in each precision, and remove it."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="build-memory-", dir=arguments.temporary) as folder:
        directory = Path(folder) / CASES[name].component
        for precision in arguments.precisions:
            found = estimate(name, precision, Path(folder))
            if found["estimated_bytes"] < _memory_bytes():
                if not directory.exists():
                    directory.mkdir()
                    _child("make", name, precision, directory, arguments.lock)
                peaks = [
                    json.loads(_child("measure", name, precision, directory, arguments.lock).splitlines()[-1])
                    for _ in range(arguments.repeats)
                ]
                found |= {key: [peak[key] for peak in peaks] for key in peaks[0]}
                found |= judged(found)
            results[f"{name} {found['precision']}"] = found
            print(name, json.dumps(found), file=sys.stderr)
    return results


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """Each estimate divided by its peaks, and whether all of them are within the bounds."""
    ratios = {
        f"estimate_by_{what}peak": [
            found[f"estimated_{what}bytes"] / peak for peak in found[f"{what}peak_bytes"]
        ]
        for what in ("", "export_", "golden_")
    }
    return {**ratios, "holds": all(LOWEST <= ratio <= HIGHEST for each in ratios.values() for ratio in each)}


def estimate(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """What a build says before it reads any weight."""
    from ditc.export.build.estimates import build_bytes, export_bytes, golden_bytes, stage_size
    from ditc.export.families import find_adapter

    case = CASES[name]
    defaults = {"height": 1024, "width": 1024, **DEFAULTS[case.family]}
    checkpoint = headers_around(case, tokenizers_of(case.family, folder), defaults)
    options = options_of(name, precision)
    adapter = find_adapter(checkpoint)
    plan = adapter.plan(checkpoint, options)
    size = stage_size(adapter.load(checkpoint, plan, case.stage, options), plan.latents.scale_factor)
    return {
        "stage": case.stage,
        "precision": plan.stages[case.stage].precision.value,
        **asdict(size),
        "estimated_export_bytes": export_bytes(size),
        "estimated_golden_bytes": golden_bytes(size),
        "estimated_bytes": build_bytes(size),
    }


def measure(name: str, precision: str, directory: Path) -> dict[str, Any]:
    """Build the stage. Call it in a fresh process: peak memory counts the whole process."""
    from ditc.export.build import preflight
    from ditc.export.build.golden_artifact import golden_artifact
    from ditc.export.build.graph_artifact import graph_artifact

    case = CASES[name]
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        defaults = {"height": 1024, "width": 1024, **DEFAULTS[case.family]}
        tokenizers = tokenizers_of(case.family, Path(folder))
        build = _context(
            checkpoint_around(case, directory, tokenizers, defaults), name, precision, Path(folder)
        )
        reset_peak()
        preflight.check_weights(
            build.checkpoint, build.adapter, build.plan, build.options, build.out, [case.stage], print
        )
        checked = _peak_bytes()
        reset_peak()
        record = graph_artifact(build, case.stage)
        exported = _peak_bytes()
        reset_peak()
        golden_artifact(build, record, (record.artifact,))
        golden = _peak_bytes()
    return {
        "check_weights_peak_bytes": checked,
        "export_peak_bytes": exported,
        "golden_peak_bytes": golden,
        "peak_bytes": max(checked, exported, golden),
    }


def options_of(name: str, precision: str) -> Any:
    """The options of a build. Text encoders and VAEs are 16-bit in engines only."""
    from ditc.export.contract import BuildOptions
    from ditc.runtime.spec import Backend, Precision

    if precision == "fp32":
        return BuildOptions()
    case = CASES[name]
    sixteen = case.dtype if case.component == "transformer" else "bf16"
    return BuildOptions(precision=Precision(sixteen), backend=Backend.TENSORRT_RTX)


def _context(checkpoint: Checkpoint, name: str, precision: str, out: Path) -> BuildContext:
    """A build of the case's stage alone."""
    from ditc.export.build.context import BuildContext
    from ditc.export.build.events import EventLog
    from ditc.export.build.journal import Journal
    from ditc.export.families import find_adapter

    options, stage = options_of(name, precision), CASES[name].stage
    adapter = find_adapter(checkpoint)
    plan = adapter.plan(checkpoint, options)
    return BuildContext(
        checkpoint=checkpoint,
        adapter=adapter,
        plan=replace(plan, stages={stage: plan.stages[stage]}),
        options=options,
        out=out,
        old=None,
        targets=(),
        quantization=None,
        journal=Journal(out),
        events=EventLog(lambda event: None),
    )


def _child(task: str, name: str, precision: str, directory: Path, lock: Path | None) -> str:
    command = [sys.executable, "-m", "benchmarks.build_memory", "--task", task, "--models", name]
    command += ["--precisions", precision, "--directory", str(directory)]
    with ExitStack() as stack:
        if lock is not None:
            import fcntl

            file = stack.enter_context(lock.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _memory_bytes() -> int:
    from ditc.export.build.estimates import available_memory_bytes

    return available_memory_bytes()


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
