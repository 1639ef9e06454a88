"""How many seconds per step and how much memory does it take to calibrate a full-width Sana-0.6B on a CPU?

    python -m benchmarks.calibrate_scale [--size 1024] [--num-prompts 2] [--steps 4] [--dtype fp32]

The weights are random. The denoiser is the one of benchmarks.full_size. The text encoder has Gemma-2-2b's width but
one layer, because only the shape of its output matters here. The measurement runs in its own process, whose largest
resident size is reported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.full_size import CASES, DEFAULTS, GEMMA, TOKENIZER, checkpoint_around, make
from benchmarks.machine import write

if TYPE_CHECKING:
    from ditc.export.checkpoint.open import Checkpoint

MODEL = "sana-0.6b"
GOAL_BYTES = 12e9


def main() -> None:
    """Make the checkpoint and measure its calibration, each in its own process, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="pixels of height and width")
    parser.add_argument("--num-prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--temporary", type=Path, help="folder for the weights: 1.2 GB")
    parser.add_argument("--task", choices=["make", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task == "make":
        make_parts(arguments.directory)
    elif arguments.task == "measure":
        print(json.dumps(measure(arguments)))
    else:
        with tempfile.TemporaryDirectory(prefix="calibrate-scale-", dir=arguments.temporary) as folder:
            for task in ("make", "measure"):
                command = [sys.executable, "-m", "benchmarks.calibrate_scale", *sys.argv[1:]]
                command += ["--task", task, "--directory", folder]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        print(json.dumps(result), write("calibrate_scale", {MODEL: result}))


def make_parts(directory: Path) -> None:
    """Write the denoiser's weights, and a text encoder of the same width as the real one."""
    import torch
    from transformers import Gemma2Config, Gemma2Model

    denoiser = directory / "transformer"
    denoiser.mkdir()
    make(MODEL, denoiser)
    tokens = json.loads((TOKENIZER.parent / "text_encoder" / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = Gemma2Config(**{**GEMMA, "num_hidden_layers": 1, "vocab_size": tokens})
    Gemma2Model(config).save_pretrained(directory / "text_encoder")


def open_parts(directory: Path, size: int) -> Checkpoint:
    """A checkpoint whose denoiser and text encoder have weights; its autoencoder has only a config."""
    from ditc.export.checkpoint.open import open_component

    defaults = {**DEFAULTS["sana"], "resolution_bins": None, "height": size, "width": size}
    checkpoint = checkpoint_around(
        CASES[MODEL], directory / "transformer", {"tokenizer": TOKENIZER}, defaults
    )
    checkpoint.components["text_encoder"] = open_component(directory / "text_encoder")
    return checkpoint


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and measure. Call it in a fresh process: peak memory counts the whole process."""
    import torch

    from ditc.calib.collect import Progress, Settings, collect
    from ditc.calib.prompts import GENERAL, read_prompts
    from ditc.export.engine.memory import PeakMemory
    from ditc.runtime.spec import Precision

    steps: list[Progress] = []
    out = arguments.directory / "ranges.safetensors"
    settings = Settings(num_inference_steps=arguments.steps, precision=Precision(arguments.dtype))
    with PeakMemory() as memory:
        ranges = collect(
            open_parts(arguments.directory, arguments.size),
            read_prompts(GENERAL)[: arguments.num_prompts],
            out,
            settings,
            on_progress=steps.append,
        )
    seconds = [after.seconds - before.seconds for before, after in itertools.pairwise(steps)]
    return {
        "size": arguments.size,
        "dtype": arguments.dtype,
        "prompts": len(ranges.prompts),
        "steps": ranges.origin.num_inference_steps,
        "guidance_scale": ranges.origin.guidance_scale,
        "layers": len(ranges.site_of),
        "threads": torch.get_num_threads(),
        "seconds_per_step": sorted(seconds)[len(seconds) // 2],
        "seconds_of_each_step": seconds,
        "seconds": steps[-1].seconds,
        "ranges_bytes": out.stat().st_size,
        "peak_bytes": memory.peak_bytes,
        "peak_anonymous_bytes": memory.peak_anonymous_bytes,
        "within_goal": memory.peak_bytes <= GOAL_BYTES,
    }


if __name__ == "__main__":
    main()
