"""`ditc run BUNDLE PROMPT -o out.png`: draws pictures, or videos, with a bundle."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.runtime.commands.bundle_argument import read_bundle_argument
from ditc.runtime.commands.run_arguments import add_arguments as add_arguments
from ditc.runtime.commands.run_results import Results
from ditc.runtime.errors import OutputError, UsageError
from ditc.runtime.files import check_name, check_writable
from ditc.runtime.limits import MAX_FPS, MAX_PICTURES
from ditc.runtime.load_options import load_options
from ditc.runtime.lora.choice import parse_loras
from ditc.runtime.png import SCHEDULE, TEXTS, save_png
from ditc.runtime.prompts import read_prompts
from ditc.runtime.video_files import WRITERS, check_video_path

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
    *("allow_uniform", "strict", "frames", "motion_score"),
)


def run(arguments: argparse.Namespace) -> int:
    """Load the bundle, draw and save. Every file is complete or does not exist.

    Returns:
        0 if every picture was drawn, else 1. It is an error if none was.
    """
    prompts, options, loras = _prompts(arguments), load_options(arguments), parse_loras(arguments.lora)
    _check_kind(arguments.output, videos=None)
    if arguments.fps is not None and not 1 <= arguments.fps <= MAX_FPS:
        raise UsageError(f"--fps is {arguments.fps}", hint=f"pass 1 to {MAX_FPS}")
    count = len(prompts) * arguments.num_images_per_prompt
    if count > MAX_PICTURES:
        raise UsageError(
            f"{len(prompts)} prompts x {arguments.num_images_per_prompt} pictures are {count} pictures",
            hint=f"draw at most {MAX_PICTURES} in one run",
        )
    if arguments.output is not None:
        _check_places(_paths(arguments.output, count))
    if arguments.preview is not None:
        check_writable(_preview_path(arguments.preview, 0, 0, 0), "--preview")
    from ditc.runtime.bundle.manifest import load_manifest
    from ditc.runtime.image_files import read_image
    from ditc.runtime.lora.lora_file import check_readable
    from ditc.runtime.pipeline import Pipeline
    from ditc.runtime.request import Request
    from ditc.runtime.request_checks import checked
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
    bundle = read_bundle_argument(arguments)
    defaults = load_manifest(bundle).defaults
    output = arguments.output or Path("out.png" if defaults.frames is None else "out.mp4")
    _check_kind(output, videos=defaults.frames is not None)
    if defaults.fps is None and arguments.fps is not None:
        raise UsageError(
            f"--fps {arguments.fps} is given, but this bundle draws pictures", hint="leave it out"
        )
    paths = _paths(output, count)
    if arguments.output is None:
        _check_places(paths)
    given = {name: getattr(arguments, name) for name in (*TEXTS, *SETTINGS)}
    image = images["image"] or images["control_image"]
    if image is not None and given["height"] is given["width"] is None:
        given["height"], given["width"] = size_like(image.height, image.width, defaults)
    given |= images
    request = checked(Request(prompt=prompts, **given))
    for lora in loras:
        check_readable(lora.file)
    with Pipeline.load(bundle, options=options) as pipeline:
        if pipeline.uncertified:
            log.warning("the bundle is not certified: %s", pipeline.uncertified)
        pipeline.load_loras(loras)
        if arguments.preview is not None:
            pipeline.steps_per_launch = 1
        plan = pipeline.plan(request)
        pixels = plan.height * plan.width * (plan.frames or 1)
        check_writable(paths[0], "-o", needed_bytes=len(paths) * pixels * RGB_BYTES)
        results = Results(pipeline, plan, paths, fps=arguments.fps or defaults.fps)
        with results.kept_on_error():
            _draw(pipeline, plan, arguments.preview, results.save)
        peak = pipeline.device.peak_bytes if pipeline.device is not None else None
    for hint in dict.fromkeys(failure.hint for failure in results.failures if failure.hint):
        sys.stderr.write(f"hint: {hint}\n")
    _print(arguments, results, pipeline.chosen, peak)
    return 1 if results.failures else 0


def _check_kind(output: Path | None, *, videos: bool | None) -> None:
    """Refuse a file of another kind than what is drawn.

    Args:
        videos: whether videos are drawn; None if that is not known yet.
    """
    if output is None or (videos is None and output.suffix.lower() in WRITERS):
        return
    if videos:
        check_video_path(output)
    elif output.suffix.lower() != ".png":
        raise UsageError(
            f"output {output} is not a .png",
            hint="name a .png file: pictures carry their settings as PNG text",
        )


def _check_places(paths: Sequence[Path]) -> None:
    """Check every name, and that the first file can be written."""
    for path in paths:
        check_name(path, "-o")
    check_writable(paths[0], "-o")


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
            doing = "decoding" if step.state.done else "denoising"
            progress.update(task, description=doing, total=step.total, completed=step.index + 1)
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
    backend = chosen.partition(":")[0]
    sys.stdout.write(f"{names}  seed {results.plan.seed}  ({backend}: {times}{peak})\n")
