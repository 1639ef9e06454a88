"""`ditc calibrate --workers N`: measures shards of the prompts in processes side by side, and adds them up.

Every process is the same command with `--shard I/N`, which keeps what it has measured in a file of its own. So a killed
run goes on where each of them stopped, and the sum is that of one process, whatever their number.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from ditc.export.quant.ranges import Ranges, load_ranges, merge_ranges, save_ranges
from ditc.runtime.cores import default_threads
from ditc.runtime.errors import SessionError

# The options that a shard gets from the whole run, by the name of the parsed argument.
_OPTIONS = {
    "variant": "--variant",
    "controlnet": "--controlnet",
    "stage": "--stage",
    "prompts": "--prompts",
    "num_prompts": "--num-prompts",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "seed": "--seed",
    "dtype": "--dtype",
    "device": "--device",
}


def shard_paths(output: Path, workers: int) -> list[Path]:
    """The files of the shards, which are removed when they have been added up."""
    return [output.with_name(f"{output.stem}.shard-{i}-of-{workers}{output.suffix}") for i in range(workers)]


def measure_in_processes(arguments: argparse.Namespace, workers: int) -> Ranges:
    """Measure with so many processes, and write the sum to the output.

    Raises:
        SessionError: a process has failed. What the others have measured stays, for the next run.
    """
    paths = shard_paths(arguments.output, workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, default_threads() // workers))}
    with ExitStack() as stack:
        started = []
        for index, path in enumerate(paths):
            messages = stack.enter_context(tempfile.TemporaryFile())
            command = [
                sys.executable,
                "-P",
                "-m",
                "ditc.runtime.cli",
                *_command(arguments, path, index, workers),
            ]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages, env=environment)
            stack.callback(process.wait)
            stack.callback(process.terminate)  # nothing happens if it has ended
            started.append((process, messages))
        for index, (process, messages) in enumerate(started):
            if process.wait():
                messages.seek(0)
                said = messages.read().decode(errors="replace").strip()
                raise SessionError(
                    f"shard {index}/{workers} ended with exit code {process.returncode}: {said[-500:]}",
                    hint="mend what it says and run the same command again; what was measured is kept",
                )
    merged = merge_ranges([load_ranges(path) for path in paths])
    save_ranges(merged, arguments.output)
    for path in paths:
        path.unlink()
    return merged


def _command(arguments: argparse.Namespace, path: Path, index: int, workers: int) -> list[str]:
    words = ["calibrate", str(arguments.checkpoint), "-o", str(path), "--shard", f"{index}/{workers}"]
    for name, option in _OPTIONS.items():
        value = getattr(arguments, name)
        if value is not None:
            words.append(f"{option}={value}")
    return words
