"""`ditc batch BUNDLE requests.jsonl -o out/`: draws many requests from a file, and can be interrupted at any time."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ditc.runtime.commands.bundle_argument import add_bundle_argument, read_bundle_argument
from ditc.runtime.errors import MissingExtra, UsageError
from ditc.runtime.files import check_writable
from ditc.runtime.limits import MAX_FPS
from ditc.runtime.load_options import LoadOptions, add_load_arguments, as_json, load_options
from ditc.runtime.video_files import VideoFormat

if TYPE_CHECKING:
    from ditc.runtime.bundle.manifest import Manifest
    from ditc.runtime.offline.folder import RunFolder
    from ditc.runtime.offline.result import VideoFiles
    from ditc.runtime.offline.run import Draw, Summary

# How many failed lines are named on stderr. The others are in results.jsonl.
NAMED = 10
MOST_WORKERS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for bundle, input, output and processes."""
    add_bundle_argument(parser)
    parser.add_argument(
        "input",
        type=Path,
        metavar="FILE",
        help='File with one request per line, as JSON: {"prompt": "a red heart", "seed": 3, "size": "512x768"}. The '
        "fields are the arguments of Pipeline, with pictures as paths relative to the file's folder; id names the line "
        "in the results.",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder for the pictures or videos and results.jsonl. If it holds a part of the same run, that goes on.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--local", action="store_true", help="Draw with processes of this machine (default: this is done)."
    )
    where.add_argument(
        "--ray",
        action="store_true",
        help="Draw with Ray Data: with the cluster that RAY_ADDRESS names, or with a Ray that is started on this "
        "machine. All its machines must see the bundle, the input and the output folder under the same paths "
        "(default: without Ray).",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="PROCESSES",
        help="Number of processes, each of which holds the bundle in memory. They share the CPU cores (default: one "
        "per entry of --devices).",
    )
    parser.add_argument(
        "--devices",
        metavar="DEVICE,...",
        help="Devices as --device takes them, separated by commas, that the processes take in turn (default: that of "
        "--device for all).",
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=0,
        metavar="PICTURES",
        help="Most pictures of one run of the denoiser; 0 takes as many as the bundle allows and measured times favour "
        "(default: %(default)s).",
    )
    parser.add_argument(
        "--video-format",
        choices=get_args(VideoFormat),
        help='Kind of the files of videos: H.264, which needs pip install "ditc[video]", or animated WebP (default: '
        "mp4).",
    )
    parser.add_argument(
        "--fps",
        type=int,
        metavar="FRAMES",
        help="Number of frames of a video that are shown in a second; it does not change the frames (default: the "
        "bundle's).",
    )
    parser.add_argument(
        "--skip-invalid",
        action="store_true",
        help="Record lines that are no requests as failed, and draw the others (default: draw nothing if there is "
        "such a line).",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="Draw lines again that failed in an earlier run (default: a failed line is finished).",
    )
    add_load_arguments(parser)
    parser.add_argument("--json", action="store_true", help="Print the summary as JSON (default: as text).")


def run(arguments: argparse.Namespace) -> int:
    """Draw every line that has no result yet.

    Returns:
        0 if all lines of the file are drawn, 1 if some have failed.
    """
    devices = _devices(arguments)
    workers = len(devices) if arguments.workers is None else arguments.workers
    if not 1 <= workers <= MOST_WORKERS:
        raise UsageError(f"--workers is {workers}", hint=f"choose 1 to {MOST_WORKERS}")
    if arguments.max_batch < 0:
        raise UsageError(
            f"--max-batch is {arguments.max_batch}", hint="choose 1 or more, or 0 for the bundle's own"
        )
    if arguments.fps is not None and not 1 <= arguments.fps <= MAX_FPS:
        raise UsageError(f"--fps is {arguments.fps}", hint=f"pass 1 to {MAX_FPS}")
    load = load_options(arguments)
    options = [replace(load, device=devices[i % len(devices)]) for i in range(workers)]
    if arguments.ray:
        _need_ray()
    from ditc.runtime.bundle.manifest import load_manifest
    from ditc.runtime.cores import default_threads
    from ditc.runtime.loader import choose_here
    from ditc.runtime.offline.folder import RESULTS, open_folder
    from ditc.runtime.offline.input_file import check_input
    from ditc.runtime.offline.run import run_batch
    from ditc.runtime.sessions.registry import device_names
    from ditc.runtime.spec import DENOISER

    check_writable(arguments.output / RESULTS, "-o")
    bundle = read_bundle_argument(arguments)
    manifest = load_manifest(bundle)
    videos = _videos(arguments, manifest)
    threads = load.threads or max(1, default_threads() // workers)
    chosen, _ = choose_here(bundle, manifest, replace(load, threads=threads))
    denoiser = chosen[DENOISER]
    # The choice must not depend on where a line is drawn, nor on when.
    backend, precision = denoiser.backend.value, denoiser.precision.value
    options = [replace(each, threads=threads, backend=backend, precision=precision) for each in options]
    source = check_input(arguments.input)
    if not arguments.skip_invalid:
        source.check()
    identity = {
        "bundle": manifest.digest,
        "input_sha256": source.sha256,
        "lines": source.lines,
        "backend": backend,
        "precision": precision,
        "stage_precision": load.stage_precision,
        "provider": load.provider,
        "device": devices[0].upper() if devices[0].upper() in device_names() else "",
    }
    if videos is not None:
        identity |= {"video_format": videos.form, "fps": videos.fps}
    with open_folder(arguments.output, identity, source.lines) as folder:
        left = source.lines - folder.done - (0 if arguments.retry_failed else folder.failed)
        draw = _draw(arguments, bundle, options, left, videos)
        with _progress(folder, left) as on_result:
            summary = run_batch(
                source, folder, draw, retry_failed=arguments.retry_failed, on_result=on_result
            )
    _print(
        arguments, summary, {**identity, "workers": workers, "threads": threads}, videos=videos is not None
    )
    return 1 if summary.failed else 0


def _videos(arguments: argparse.Namespace, manifest: Manifest) -> VideoFiles | None:
    """Which files of videos are written; None for a bundle that draws pictures.

    Raises:
        UsageError: the bundle draws pictures, and an option is about videos.
        MissingExtra: PyAV is not installed, and MP4 files need it.
    """
    from ditc.runtime.offline.result import VideoFiles
    from ditc.runtime.video_files import check_mp4

    fps = manifest.defaults.fps if arguments.fps is None else arguments.fps
    if not manifest.latents.has_frames:
        for option, value in (("--video-format", arguments.video_format), ("--fps", arguments.fps)):
            if value is not None:
                raise UsageError(
                    f"{option} {value} is given, but this bundle draws pictures", hint="leave it out"
                )
        return None
    assert fps is not None  # as in every manifest of videos
    form: VideoFormat = arguments.video_format or "mp4"
    if form == "mp4":
        check_mp4()
    return VideoFiles(form, fps)


def _devices(arguments: argparse.Namespace) -> list[str]:
    if arguments.devices is None:
        return [arguments.device]
    if arguments.device:
        raise UsageError("--device and --devices are both given", hint="give only one of them")
    devices = [device.strip() for device in arguments.devices.split(",")]
    if not all(devices):
        raise UsageError(
            f"--devices is {arguments.devices!r:.80}",
            hint="name devices with commas between them, such as 0,1",
        )
    return devices


def _need_ray() -> None:
    from importlib.util import find_spec

    for package in ("ray", "pyarrow", "pandas"):  # the last two are Ray Data's
        if find_spec(package) is None:
            raise MissingExtra(package, "ray")


def _draw(
    arguments: argparse.Namespace,
    bundle: Path,
    options: list[LoadOptions],
    left: int,
    videos: VideoFiles | None,
) -> Draw:
    """How lines are drawn: by processes, or by Ray."""
    asked: list[dict[str, Any]] = [
        {
            "bundle": str(bundle.absolute()),
            "options": as_json(each),
            "folder": str(arguments.output.absolute()),
            "inputs": str(arguments.input.absolute().parent),
            "max_batch": arguments.max_batch,
            "lines": -(-left // len(options)),
            "videos": None if videos is None else asdict(videos),
        }
        for each in options[: max(1, left)]
    ]
    if arguments.ray:
        from ditc.runtime.offline.ray_data import draw_with_ray

        return lambda lines: draw_with_ray(lines, asked, arguments.input.absolute())
    from ditc.runtime.offline.workers import draw_lines

    return lambda lines: draw_lines(lines, asked)


@contextmanager
def _progress(folder: RunFolder, left: int) -> Iterator[Any]:
    """A bar with the time left, and what failed; says what there is if the run ends early."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ditc.runtime.console import SafeConsole
    from ditc.runtime.offline.result import DONE

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, failures = SafeConsole(), 0
    # Without a terminal, a transient bar would leave an empty line behind (rich 15).
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("drawing lines", total=left)

        def on_result(result: dict[str, Any]) -> None:
            nonlocal failures
            progress.advance(task)
            if result["status"] != DONE:
                failures += 1
                if failures <= NAMED:
                    message = result["error"]["message"].removeprefix(f"line {result['line']}: ")
                    sys.stderr.write(f"error: line {result['line']}: {message}\n")

        try:
            yield on_result
        except BaseException:
            sys.stderr.write(f"{folder.ended} lines have results; the same command goes on with the others\n")
            raise
        finally:
            if failures > NAMED:
                sys.stderr.write(f"and {failures - NAMED} more lines failed; results.jsonl says why\n")


def _print(arguments: argparse.Namespace, summary: Summary, about: dict[str, Any], *, videos: bool) -> None:
    drawn = "videos" if videos else "pictures"
    per_second = round(summary.pictures_per_second, 3)
    if arguments.json:
        result = {
            "folder": str(arguments.output),
            **asdict(summary),
            "seconds": round(summary.seconds, 3),
            "pictures_per_second": per_second,
            **about,
        }
        sys.stdout.write(json.dumps(result) + "\n")
        return
    sys.stdout.write(
        f"{arguments.output}: {summary.done} of {summary.lines} lines drawn, {summary.failed} failed; now "
        f"{summary.pictures} {drawn} in {summary.seconds:.1f} s ({per_second} per second)\n"
    )
