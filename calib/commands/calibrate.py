"""`ditc calibrate CHECKPOINT -o ranges.safetensors`: measure ranges, merge them, or search for the best formats."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.export.commands.controlnet_argument import add_controlnet_argument
from ditc.runtime.errors import UsageError
from ditc.runtime.files import check_writable
from ditc.runtime.spec import CONTROLNET, DENOISER, VAE_DECODER, Precision

if TYPE_CHECKING:
    from ditc.calib.collect import Progress, Settings
    from ditc.calib.search import Budget
    from ditc.export.checkpoint.open import Checkpoint
    from ditc.export.quant.formats import Format
    from ditc.export.quant.ranges import Ranges

MOST_WORKERS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the measurement, and of the search that may follow it."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="A diffusers directory. --merge without --budget needs none.",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="File to write the ranges to, with the ending .safetensors.",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="Variant of the checkpoint's weight files, such as fp16 (default: files without one).",
    )
    add_controlnet_argument(parser, "Measure with this ControlNet, which is not part of the checkpoint.")
    parser.add_argument(
        "--stage",
        default=DENOISER,
        choices=[DENOISER, CONTROLNET, VAE_DECODER],
        help="Stage whose layers are measured. The decoder is measured on the latents that the prompts lead to "
        "(default: %(default)s).",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="File with one prompt per line (default: built-in prompts).",
    )
    parser.add_argument(
        "--num-prompts",
        type=int,
        metavar="PROMPTS",
        help="Number of prompts to measure, from the first on (default: all prompts).",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="STEPS",
        dest="num_inference_steps",
        help="Number of denoising steps (default: the checkpoint's).",
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        metavar="SCALE",
        help="Scale of the guidance, without a unit (default: the checkpoint's).",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="SEED",
        help="Seed of the first prompt, a whole number; every further prompt has the next seed (default: %(default)s).",
    )
    parser.add_argument(
        "--dtype",
        default="fp32",
        choices=["fp32", "fp16", "bf16"],
        help="Precision that the networks run in (default: %(default)s).",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="PyTorch device to run on, such as cpu or cuda (default: %(default)s).",
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="Measure only every N-th prompt, beginning with the I-th, counted from 0; --merge adds up the shards "
        "(default: %(default)s, all prompts).",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="PROCESSES",
        help="Measure with so many processes, each of which holds the model, and add up what they find. The ranges are "
        "those of one process (default: %(default)s).",
    )
    _add_search_arguments(parser)


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of shards that are merged, and of the search for a recipe."""
    parser.add_argument(
        "--budget",
        metavar="METRIC=X,...",
        help="After measuring or merging, search for the best format of every layer within this budget: psnr=40 (mean "
        "PSNR of the pictures in dB), worst=32 (PSNR of the worst picture in dB), rel_l2=0.05 (relative L2 error of "
        "the latents), or several of them with commas between them (default: no search).",
    )
    parser.add_argument(
        "--formats",
        default="int8",
        metavar="NAME,NAME",
        help="Formats that the search may use, separated by commas: int8, fp8 (default: %(default)s).",
    )
    parser.add_argument(
        "--search-prompts",
        type=int,
        metavar="PROMPTS",
        help="Number of prompts that the search draws, from the first on (default: 16).",
    )
    parser.add_argument(
        "--search-minutes",
        type=float,
        default=4.0,
        metavar="MINUTES",
        help="Minutes to spend on the table's column of final pictures (default: %(default)s).",
    )
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="Add up these files of ranges instead of measuring (default: measure).",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure or merge ranges, and search if there is a budget. Prints one summary line for each."""
    if arguments.output.suffix != ".safetensors":
        raise UsageError(
            f"output {arguments.output} is not a .safetensors file",
            hint="name it for example ranges.safetensors",
        )
    for path in _written(arguments):
        check_writable(path, "-o")
    if arguments.merge and arguments.budget is None:
        _merge(arguments)
        return 0
    if arguments.checkpoint is None:
        raise UsageError(
            "calibrate has no checkpoint to run",
            hint="use ditc calibrate CHECKPOINT -o FILE; only --merge without --budget needs none",
        )
    from ditc.calib.prompts import GENERAL, read_prompts
    from ditc.calib.search import parse_budget
    from ditc.export.checkpoint.controlnet import open_joined

    budget = None if arguments.budget is None else parse_budget(arguments.budget)
    if budget is not None and arguments.stage == CONTROLNET:
        raise UsageError(
            "--budget searches the layers of a denoiser or a decoder, not those of a ControlNet",
            hint="leave --budget out: the recipes of ControlNets name all layers of their blocks",
        )
    formats, settings = _formats(arguments.formats), _settings(arguments)
    workers = _workers(arguments)
    prompts = read_prompts(arguments.prompts or GENERAL)[: arguments.num_prompts]
    checkpoint = open_joined(arguments.checkpoint, variant=arguments.variant, controlnet=arguments.controlnet)
    if arguments.merge:
        ranges = _merge(arguments, checkpoint)
    elif workers > 1:
        ranges = _measure_in_processes(arguments, min(workers, len(prompts)))
    else:
        ranges = _measure(arguments.output, checkpoint, prompts, settings)
    if budget is not None:
        _search(arguments, checkpoint, ranges, prompts, budget, formats)
    return 0


def _written(arguments: argparse.Namespace) -> list[Path]:
    """All files that will be written. Some have longer names than the one that was given."""
    paths: list[Path] = [arguments.output]
    if not arguments.merge:
        from ditc.calib.collect import unfinished

        paths.append(unfinished(arguments.output))
    if arguments.budget is not None:
        from ditc.calib.commands.budget import Files

        files = Files.beside(arguments.output)
        paths += [files.recipe, files.table, files.curve, files.unfinished]
    return paths


def _measure(output: Path, checkpoint: Checkpoint, prompts: list[str], settings: Settings) -> Ranges:
    from ditc.calib.collect import collect

    with _Bar() as bar:
        ranges = collect(checkpoint, prompts, output, settings, on_progress=bar)
    sys.stdout.write(
        f"{output}: {len(ranges.site_of)} layers, {len(ranges.prompts)} prompts x "
        f"{ranges.origin.num_inference_steps} steps, {bar.seconds:.1f} s{bar.per_step()}\n"
    )
    if settings.shard == (0, 1):  # a shard is only a part of the prompts: --merge judges them all
        _judge(ranges)
    return ranges


def _measure_in_processes(arguments: argparse.Namespace, workers: int) -> Ranges:
    from ditc.calib.commands.shards import measure_in_processes
    from ditc.runtime.console import SafeConsole

    with SafeConsole().status(f"calibrating with {workers} processes"):
        ranges = measure_in_processes(arguments, workers)
    sys.stdout.write(
        f"{arguments.output}: {len(ranges.site_of)} layers, {len(ranges.prompts)} prompts x "
        f"{ranges.origin.num_inference_steps} steps of {workers} processes\n"
    )
    _judge(ranges)
    return ranges


def _workers(arguments: argparse.Namespace) -> int:
    workers: int = arguments.workers
    if not 1 <= workers <= MOST_WORKERS:
        raise UsageError(f"--workers is {workers}", hint=f"use 1 to {MOST_WORKERS}")
    if workers > 1 and (arguments.merge or arguments.shard != "0/1"):
        given = "--merge" if arguments.merge else "--shard"
        raise UsageError(f"--workers and {given} are both given", hint="give only one of them")
    if workers > 1 and str(arguments.prompts) == "-":
        raise UsageError("--workers cannot read prompts from stdin", hint="write them to a file")
    return workers


def _merge(arguments: argparse.Namespace, checkpoint: Checkpoint | None = None) -> Ranges:
    """Write the sum of the files. If there is a checkpoint, they must have been measured on it."""
    from ditc.export.quant.ranges import checkpoint_identity, load_ranges, merge_ranges, save_ranges

    parts = [load_ranges(path) for path in arguments.merge]
    if checkpoint is not None:
        identity = checkpoint_identity(checkpoint, parts[0].origin.network)
        parts = [load_ranges(path, identity=identity) for path in arguments.merge]
    merged = merge_ranges(parts)
    save_ranges(merged, arguments.output)
    sys.stdout.write(f"{arguments.output}: {len(merged.prompts)} prompts of {len(arguments.merge)} files\n")
    _judge(merged)
    return merged


def _judge(ranges: Ranges) -> None:
    """Say what the ranges rest on, and warn of what speaks against them."""
    from ditc.export.quant.evidence import calibration_of, warn_of_doubts

    calibration = calibration_of(ranges)
    sys.stdout.write(f"{calibration}\n")
    warn_of_doubts(calibration)


def _search(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    ranges: Ranges,
    prompts: list[str],
    budget: Budget,
    formats: list[Format],
) -> None:
    from ditc.calib.commands.budget import PROMPTS, Files, as_text, find_mixed, write_result
    from ditc.runtime.console import SafeConsole

    result = find_mixed(
        checkpoint,
        ranges,
        prompts[: arguments.search_prompts or PROMPTS],
        budget,
        formats,
        journal=Files.beside(arguments.output).unfinished,
        picture_seconds=60 * arguments.search_minutes,
        console=SafeConsole(),
    )
    files = write_result(result, arguments.output)
    sys.stdout.write(as_text(result))
    sys.stdout.write(
        f"{files.recipe}: recipe for ditc build --recipe; {files.table}: table; {files.curve}: curve\n"
    )


def _formats(text: str) -> list[Format]:
    from ditc.export.quant.formats import Format

    try:
        return [Format(part) for part in text.split(",")]
    except ValueError as e:
        raise UsageError(f"formats {text!r}: {e}", hint="use int8, fp8, or int8,fp8") from e


def _settings(arguments: argparse.Namespace) -> Settings:
    from ditc.calib.collect import Settings

    try:
        index, count = (int(part) for part in arguments.shard.split("/"))
    except ValueError as e:
        raise UsageError(
            f"shard {arguments.shard!r} is not I/N", hint="use --shard 0/2 and --shard 1/2 on two machines"
        ) from e
    if not 0 <= index < count:
        raise UsageError(
            f"shard {arguments.shard}: there is no such part",
            hint="parts are counted from 0: use --shard 0/2 and --shard 1/2 on two machines",
        )
    if arguments.num_inference_steps is not None and arguments.num_inference_steps < 1:
        raise UsageError(f"--steps is {arguments.num_inference_steps}", hint="use at least 1 step")
    if arguments.num_prompts is not None and arguments.num_prompts < 1:
        raise UsageError(f"--num-prompts is {arguments.num_prompts}", hint="use at least 1 prompt")
    return Settings(
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        precision=Precision(arguments.dtype),
        device=arguments.device,
        shard=(index, count),
        stage=arguments.stage,
    )


class _Bar:
    """A progress bar on stderr that shows the time left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from ditc.runtime.console import SafeConsole

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = SafeConsole()
        # Without a terminal, a transient bar leaves a blank line (rich 15).
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("calibrating", total=None)
        self.seconds, self._steps = 0.0, 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, progress: Progress) -> None:
        self.seconds, self._steps = progress.seconds, progress.done
        self._progress.update(self._task, total=progress.total, completed=progress.done)

    def per_step(self) -> str:
        """The seconds per step; "" if no step ran."""
        return f", {self.seconds / self._steps:.3f} s per step" if self._steps else ""
