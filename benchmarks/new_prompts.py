"""How long does a picture take whose prompt is new? A server rarely draws the same prompt twice.

    python -m benchmarks.new_prompts BUNDLE [--rounds 15] [--steps 20] [--threads 0] [--only "openvino fp32" ...]

Each contestant is a process of its own that keeps its bundle loaded. They draw one picture in turn, in a random order
in every round, and each picture's prompt is new to its process. The contestants are the denoisers that the bundle has
for the CPU. "spinning" is ONNX Runtime fp32 as it is without ditc's setting: the threads of each session go on spinning
after its run. Fidelity is to the first contestant's picture of the same prompt and seed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from time import perf_counter, sleep
from typing import Any

from benchmarks.machine import spread, write
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cpu_features import cpu_features
from ditc.runtime.preference import why_not
from ditc.runtime.sessions.registry import missing, row_of
from ditc.runtime.spec import DENOISER

PROMPTS = (
    Path(__file__).parents[1] / "calib" / "prompts" / "demo.txt"
)  # calibration takes them from the beginning
SPINNING = "onnxruntime fp32, spinning"
WARM_UP = 2
EQUAL = 1e-16  # the mean square error of equal pictures counts as this, 160 dB
GAP_S = 0.1  # threads of one contestant that still spin must not slow the next one


def main() -> None:
    """Draw the rounds, and print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--threads", type=int, default=0, help="Threads of every stage; 0 takes one per core (default: 0)."
    )
    parser.add_argument("--only", nargs="*", help="Names of the contestants to run (default: all).")
    arguments = parser.parse_args()
    names = [name for name in contestants(arguments.bundle) if name in (arguments.only or [name])]
    load_before = os.getloadavg()
    results = race(arguments.bundle, names, arguments.rounds, arguments.steps, arguments.threads)
    summary: dict[str, Any] = {}
    for name, (times, psnr) in results.items():
        summary[name] = {"seconds": spread(times), "psnr_db": {"mean": fmean(psnr), "min": min(psnr)}}
        low, middle, high = (1e3 * summary[name]["seconds"][key] for key in ("min", "median", "quartile_3"))
        sys.stdout.write(
            f"{name:<28}median {middle:6.1f} ms, from {low:.1f}, 3 of 4 below {high:.1f}; "
            f"PSNR mean {fmean(psnr):.1f} dB, lowest {min(psnr):.1f}\n"
        )
    write(
        "new_prompts",
        {
            "bundle": arguments.bundle.name,
            "rounds": arguments.rounds,
            "steps": arguments.steps,
            "threads": arguments.threads,
            "cpu_features": cpu_features(),
            "load_before": load_before,
            "load_after": os.getloadavg(),
            "results": summary,
        },
    )


def contestants(bundle: Path) -> Iterator[str]:
    """Backend and precision of every denoiser that this machine's CPU runs, and the one that spins."""
    for artifact in load_manifest(bundle).stages[DENOISER].artifacts:
        runs = not row_of(artifact.backend).same_gpu and not missing(artifact.backend)
        if runs and not why_not(artifact):
            name = f"{artifact.backend} {artifact.precision.value}"
            yield name
            if f"{name}, spinning" == SPINNING:
                yield SPINNING


def race(
    bundle: Path, names: list[str], rounds: int, steps: int, threads: int
) -> dict[str, tuple[list[float], list[float]]]:
    """For each contestant, its times in seconds, and the PSNR of each picture to the first contestant's, in dB."""
    import numpy as np

    context, pipes, processes = get_context("spawn"), {}, []
    for name in names:
        ours, theirs = context.Pipe()
        processes.append(
            context.Process(target=draw_on_request, args=(theirs, str(bundle), name, steps, threads))
        )
        processes[-1].start()
        pipes[name] = ours
    times: dict[str, list[float]] = {name: [] for name in names}
    psnr: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for number in range(WARM_UP + rounds):
        pictures = {}
        for name in order.sample(names, len(names)):
            sleep(GAP_S)
            pipes[name].send(number)
            seconds, pictures[name] = pipes[name].recv()
            if number >= WARM_UP:
                times[name].append(seconds)
        for name in names:
            error = float(np.mean((pictures[name] - pictures[names[0]]) ** 2))
            psnr[name].append(-10 * float(np.log10(max(error, EQUAL))))
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    return {name: (times[name], psnr[name]) for name in names}


def draw_on_request(pipe: Connection, bundle: str, name: str, steps: int, threads: int) -> None:
    """Draw a picture whenever a number is received, and send its time and the picture; None ends it."""
    from ditc.runtime.pipeline import Pipeline

    if name == SPINNING:
        _keep_spinning()
    backend, precision = name.split(",")[0].split()
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    with Pipeline.load(bundle, backend=backend, precision=precision, threads=threads) as pipeline:
        while (number := pipe.recv()) is not None:
            begin = perf_counter()
            prompt = prompts[-1 - number % len(prompts)]
            output = pipeline(prompt, num_inference_steps=steps, seed=number, output_type="np")
            pipe.send((perf_counter() - begin, output.images))


def _keep_spinning() -> None:
    """Leave out ditc's setting from all sessions that this process makes."""
    import onnxruntime as ort

    class Options(ort.SessionOptions):  # type: ignore[misc, unused-ignore]
        def add_session_config_entry(self, key: str, value: str) -> None:
            if key != "session.force_spinning_stop":
                super().add_session_config_entry(key, value)

    ort.SessionOptions = Options


if __name__ == "__main__":
    main()
