"""`ditc run BUNDLE PROMPT -o out.png`: draws pictures with a bundle."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ditc.runtime.commands.bundle_argument import add_bundle_argument, read_bundle_argument
from ditc.runtime.commands.run_results import Results
from ditc.runtime.errors import OutputError, UsageError
from ditc.runtime.files import check_name, check_writable
from ditc.runtime.limits import MAX_PICTURES
from ditc.runtime.load_options import add_load_arguments, load_options
from ditc.runtime.lora.choice import add_lora_argument, parse_loras
from ditc.runtime.png import SCHEDULE, TEXTS, save_png
from ditc.runtime.prompts import read_prompts

if TYPE_CHECKING:
    from ditc.runtime.output import Drawn
    from ditc.runtime.pipeline import Pipeline, Step
    from ditc.runtime.prepare import Plan

log = logging.getLogger(__name__)

# A PNG file of a picture is seldom larger than its pixels.
RGB_BYTES = 3

# Fields of Request. Each has an option of the same name.
SETTINGS = (
    *("num_inference_steps", *SCHEDULE, "guidance_scale", "height", "width", "seed", "num_images_per_prompt"),
    *("skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"),
    *("pag_scale", "pag_adaptive_scale", "guidance_interval"),
    *("strength", "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"),
    *("allow_uniform", "strict"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for bundle, request and output. Those of the request have diffusers' names where it has them."""
    add_bundle_argument(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="The text that says what to draw.")
    parser.add_argument(
        "--prompt", metavar="TEXT", dest="prompt_option", help="The same as PROMPT (default: PROMPT)."
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="Read one prompt per line from this file, or from stdin if it is - (default: PROMPT alone).",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        metavar="FILE",
        help="PNG file to write; several pictures get -0, -1 and so on before the .png (default: %(default)s).",
    )
    _add_request_arguments(parser)
    add_lora_argument(parser, "Draw with this LoRA, with all its changes multiplied by SCALE.")
    add_load_arguments(parser)
    parser.add_argument(
        "--preview",
        type=Path,
        metavar="DIR",
        help="After every step, write a rough picture of the current state into this folder (default: none).",
    )
    parser.add_argument(
        "--allow-uniform",
        action="store_true",
        help="Keep a picture that has only one colour (default: such a picture has failed).",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="End at the first picture that fails, because it has NaN, Inf or one colour only, and write nothing that "
        "was drawn together with it or later (default: write the others, name those that failed, and exit with 1).",
    )
    parser.add_argument("--json", action="store_true", help="Print the result as JSON (default: as text).")


def _add_request_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--negative-prompt",
        default="",
        metavar="TEXT",
        help="The text that says what the picture should not look like; used with --guidance-scale above 1 "
        "(default: an empty text).",
    )
    for number, nth in ((2, "second"), (3, "third")):
        parser.add_argument(
            f"--prompt-{number}",
            metavar="TEXT",
            help=f"Another text for the bundle's {nth} text encoder, if it has one (default: PROMPT).",
        )
        parser.add_argument(
            f"--negative-prompt-{number}",
            metavar="TEXT",
            help=f"Another negative text for the {nth} text encoder (default: that of --negative-prompt).",
        )
    parser.add_argument(
        "--steps",
        "--num-inference-steps",
        type=int,
        metavar="STEPS",
        dest="num_inference_steps",
        help="Number of denoising steps (default: the bundle's).",
    )
    for name, first in (("sigmas", "1"), ("timesteps", "1000 (SCM: 1.5708, and one number more than steps)")):
        parser.add_argument(
            f"--{name}",
            type=_numbers,
            metavar="NUMBERS",
            help=f"Your own schedule instead of a number of steps: falling {name} before the scheduler's shift, with "
            f"commas, from about {first} on. Not every scheduler takes them (default: the scheduler's).",
        )
    parser.add_argument(
        "--max-timesteps",
        type=float,
        metavar="RADIANS",
        help="The first angle of SCM's schedule, which few-step models have, in radians (default: the bundle's).",
    )
    parser.add_argument(
        "--intermediate-timesteps",
        type=_number_or_none,
        metavar="RADIANS",
        help="The second angle of SCM's schedule of two steps, in radians, or none to space them evenly (default: the "
        "bundle's).",
    )
    parser.add_argument(
        "--mu",
        type=float,
        metavar="SHIFT",
        help="The shift of the noise schedule, without a unit, for a scheduler with dynamic shifting (default: that of "
        "the picture's size).",
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        metavar="SCALE",
        help="Scale of the guidance, without a unit: how strongly the picture follows the prompt. Up to 1, "
        "classifier-free guidance is off (default: the bundle's).",
    )
    parser.add_argument(
        "--skip-layer-guidance-scale",
        type=float,
        metavar="SCALE",
        help="Scale of the skip-layer guidance, without a unit: how strongly to guide the picture away from what the "
        "network draws without some of its layers. 0 turns it off; not every bundle has it (default: the bundle's).",
    )
    for end, verb in (("start", "begins"), ("stop", "ends")):
        parser.add_argument(
            f"--skip-layer-guidance-{end}",
            type=float,
            metavar="FRACTION",
            help=f"Where skip-layer guidance {verb}, as a fraction of the steps from 0 to 1 (default: the bundle's).",
        )
    parser.add_argument(
        "--pag-scale",
        type=float,
        metavar="SCALE",
        help="Scale of the perturbed-attention guidance, without a unit: how strongly to guide the picture away from "
        "what the network draws if patches do not see each other in some of its layers. 0 turns it off; not every "
        "bundle has it (default: the bundle's).",
    )
    parser.add_argument(
        "--pag-adaptive-scale",
        type=float,
        metavar="SCALE",
        help="How much the scale of the perturbed-attention guidance falls per timestep below 1000, without a unit; 0 "
        "keeps it constant (default: the bundle's).",
    )
    parser.add_argument(
        "--guidance-interval",
        type=_numbers,
        metavar="START,STOP",
        help="Where all guidance begins and ends, as fractions of the steps from 0 to 1. Other steps take less time "
        "(default: 0,1).",
    )
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}",
            type=int,
            metavar="PX",
            help=f"The picture's {side} in pixels (default: the bundle's; with --image or --control-image, that of the "
            "trained size whose shape is nearest to the image's).",
        )
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="Start from this picture (PNG, JPEG or WebP) instead of noise alone (default: none).",
    )
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        dest="mask_image",
        help="Where to draw: white is drawn anew, black keeps the --image (default: everywhere).",
    )
    parser.add_argument(
        "--strength",
        type=float,
        metavar="FRACTION",
        help="How much of the --image is replaced: the fraction of the steps from 0 to 1 that are done (default: 0.6).",
    )
    parser.add_argument(
        "--control-image",
        type=Path,
        metavar="FILE",
        help="The picture that the bundle's ControlNet reads, such as edges (PNG, JPEG or WebP; default: none, and the "
        "bundle draws as if it had no ControlNet).",
    )
    parser.add_argument(
        "--controlnet-conditioning-scale",
        type=float,
        metavar="SCALE",
        help="How strongly the --control-image acts, without a unit; 0 turns it off (default: 1).",
    )
    for end, verb, default in (("start", "begins", 0), ("end", "ceases", 1)):
        parser.add_argument(
            f"--control-guidance-{end}",
            type=float,
            metavar="FRACTION",
            help=f"Where the --control-image {verb} to act, as a fraction of the steps, 0 to 1 (default: {default}).",
        )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="SEED",
        help="Seed of the noise that the pictures start from, a whole number (default: a random seed, which is "
        "printed).",
    )
    parser.add_argument(
        "-n",
        "--num-images-per-prompt",
        type=int,
        default=1,
        metavar="PICTURES",
        help="Number of pictures per prompt (default: %(default)s).",
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between them") from e


def _number_or_none(text: str) -> float | Literal[False]:
    try:
        return False if text == "none" else float(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number or none") from e


def run(arguments: argparse.Namespace) -> int:
    """Load the bundle, draw and save. Every PNG file is complete or does not exist.

    Returns:
        0 if every picture was drawn, else 1. It is an error if none was.
    """
    prompts, options, loras = _prompts(arguments), load_options(arguments), parse_loras(arguments.lora)
    if arguments.output.suffix.lower() != ".png":
        raise UsageError(
            f"output {arguments.output} is not a .png",
            hint="name a .png file: pictures carry their settings as PNG text",
        )
    count = len(prompts) * arguments.num_images_per_prompt
    if count > MAX_PICTURES:
        raise UsageError(
            f"{len(prompts)} prompts x {arguments.num_images_per_prompt} pictures are {count} pictures",
            hint=f"draw at most {MAX_PICTURES} in one run",
        )
    paths = _paths(arguments.output, count)
    for path in paths:
        check_name(path, "-o")
    for path in paths[:1]:
        check_writable(path, "-o")
    if arguments.preview is not None:
        check_writable(_preview_path(arguments.preview, 0, 0, 0), "--preview")
    from ditc.runtime.image_files import read_image
    from ditc.runtime.pipeline import Pipeline
    from ditc.runtime.request import Request
    from ditc.runtime.sizes import size_like

    images = {
        name: None if path is None else read_image(path, option)
        for name, option in (
            ("image", "--image"),
            ("mask_image", "--mask"),
            ("control_image", "--control-image"),
        )
        for path in (getattr(arguments, name),)
    }
    with Pipeline.load(read_bundle_argument(arguments), options=options) as pipeline:
        if pipeline.uncertified:
            log.warning("the bundle is not certified: %s", pipeline.uncertified)
        pipeline.load_loras(loras)
        if arguments.preview is not None:
            pipeline.steps_per_launch = 1
        given = {name: getattr(arguments, name) for name in (*TEXTS, *SETTINGS)}
        image = images["image"] or images["control_image"]
        if image is not None and given["height"] is given["width"] is None:
            given["height"], given["width"] = size_like(image.height, image.width, pipeline.manifest.defaults)
        given |= images
        request = Request(prompt=prompts, **given)
        plan = pipeline.plan(request)
        check_writable(paths[0], "-o", needed_bytes=len(paths) * plan.height * plan.width * RGB_BYTES)
        results = Results(pipeline, plan, paths)
        with results.kept_on_error():
            _draw(pipeline, plan, arguments.preview, results.save)
        peak = pipeline.device.peak_bytes if pipeline.device is not None else None
    for hint in dict.fromkeys(failure.hint for failure in results.failures if failure.hint):
        sys.stderr.write(f"hint: {hint}\n")
    _print(arguments, results, pipeline.chosen, peak)
    return 1 if results.failures else 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    texts = [text for text in (arguments.prompt, arguments.prompt_option) if text is not None]
    if len(texts) + (arguments.prompts is not None) != 1:
        raise UsageError(
            "give a PROMPT or --prompts FILE, but not both", hint='ditc run BUNDLE "a red heart" -o out.png'
        )
    return texts or read_prompts(arguments.prompts)


def _draw(pipeline: Pipeline, plan: Plan, preview: Path | None, save: Callable[[Drawn], None]) -> None:
    """Draw the pictures, and save each as soon as it and those that are drawn with it are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ditc.runtime.console import SafeConsole

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = SafeConsole()
    # Without a terminal, a transient bar would leave an empty line behind (rich 15).
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("encoding text", total=None)

        def on_step(step: Step) -> None:
            progress.update(task, description="denoising", total=step.total, completed=step.index + 1)
            if preview is not None:
                _save_previews(pipeline, step, preview)

        for part in pipeline.draw_each(plan, on_step=on_step):
            save(part)


def _save_previews(pipeline: Pipeline, step: Step, folder: Path) -> None:
    try:
        for i, picture in enumerate(pipeline.preview(step.state)):
            save_png(picture, _preview_path(folder, step.index, step.chunk, i), {})
    except OutputError as e:  # the pictures themselves are worth more than a preview
        log.warning("%s", e)


def _preview_path(folder: Path, step: int, chunk: int, sample: int) -> Path:
    return folder / f"step-{step:03d}-{chunk}-{sample}.png"


def _paths(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]


def _print(arguments: argparse.Namespace, results: Results, chosen: str, gpu_peak_bytes: int | None) -> None:
    seconds = {name: round(value, 3) for name, value in results.seconds.items()}
    if arguments.json:
        result = {
            "files": [None if file is None else str(file) for file in results.files],
            "failures": [asdict(failure) for failure in results.failures],
            "seed": results.plan.seed,
            "seconds": seconds,
            "backend": chosen,
            "gpu_peak_bytes": gpu_peak_bytes,
        }
        sys.stdout.write(json.dumps(result) + "\n")
        return
    times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    names = ", ".join(str(file) for file in results.files if file is not None)
    peak = "" if gpu_peak_bytes is None else f", GPU memory peak {gpu_peak_bytes / 1e9:.2f} GB"
    sys.stdout.write(f"{names}  seed {results.plan.seed}  ({times}{peak})\n")
