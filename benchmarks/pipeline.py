"""Does a bundle draw what diffusers draws, and how fast, in one run: `make bench`.

For fidelity, it compares the latents after every step and the picture, for both samplers at two sizes. For time, it
measures the first picture after loading, and the seconds per stage.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline

from benchmarks.machine import write
from ditc.export.checkpoint.scheduler_config import scheduler_params
from ditc.runtime.load_options import add_load_arguments, load_options
from ditc.runtime.pipeline import Pipeline

PROMPT = "a red heart, flat style"


def fidelity(
    checkpoint: Path, pipeline: Pipeline, reference: SanaPipeline, steps: int
) -> list[dict[str, Any]]:
    """Worst relative L2 of any step and PSNR of the picture, for both samplers at two sizes."""
    defaults, original, rows = pipeline.manifest.defaults, pipeline.manifest, []
    fixed = json.loads((checkpoint / "ditc.json").read_text())
    wide = (defaults.height // 32 * 32 or 32, max(32, defaults.width * 3 // 4 // 32 * 32))
    samplers = {
        "dpm-solver++": DPMSolverMultistepScheduler.from_pretrained(checkpoint / "scheduler"),
        "euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    for sampler, scheduler in samplers.items():
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        pipeline.manifest = replace(original, scheduler=scheduler_params(config))
        reference.scheduler = scheduler
        for height, width in ((defaults.height, defaults.width), wide):
            theirs: list[Any] = []
            ours: list[Any] = []
            settings = {
                "height": height,
                "width": width,
                "num_inference_steps": steps,
                "guidance_scale": defaults.guidance_scale,
                "output_type": "np",
            }
            expected = reference(
                PROMPT,
                generator=torch.Generator().manual_seed(0),
                use_resolution_binning=False,
                complex_human_instruction=fixed["complex_human_instruction"],
                max_sequence_length=fixed["max_sequence_length"],
                callback_on_step_end=lambda p, i, t, k, to=theirs: (
                    to.append(k["latents"].numpy().copy()),
                    k,
                )[1],
                **settings,
            ).images
            images = pipeline(
                PROMPT,
                seed=0,
                callback_on_step_end=lambda p, i, t, k, to=ours: to.append(k["latents"].copy()),
                **settings,
            ).images
            errors = [
                float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(ours, theirs, strict=True)
            ]
            psnr = float(-10 * np.log10(np.mean((images.astype(np.float64) - expected) ** 2)))
            rows.append(
                {"sampler": sampler, "size": [height, width], "worst_step": max(errors), "psnr_db": psnr}
            )
    pipeline.manifest = original
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument("--no-write", action="store_true")
    add_load_arguments(parser)
    arguments = parser.parse_args()
    before = perf_counter()
    with Pipeline.load(arguments.bundle, options=load_options(arguments)) as pipeline:
        loaded = perf_counter()
        first = pipeline(PROMPT, seed=0, num_inference_steps=arguments.steps)
        drawn = perf_counter()
        second = pipeline(PROMPT, seed=1, num_inference_steps=arguments.steps)
        reference = SanaPipeline.from_pretrained(arguments.model, torch_dtype=torch.float32)
        reference.set_progress_bar_config(disable=True)
        steps = arguments.steps or pipeline.manifest.defaults.num_inference_steps
        results = {
            "load_s": loaded - before,
            "first_picture_s": drawn - loaded,
            "stages_first_s": first.seconds,
            "stages_second_s": second.seconds,
            "fidelity": fidelity(arguments.model, pipeline, reference, steps),
        }
    print(json.dumps(results, indent=1))
    if not arguments.no_write:
        print(write("pipeline", results))


if __name__ == "__main__":
    main()
