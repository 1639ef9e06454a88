"""`ditc bench BUNDLE`: measures how fast a bundle is here, its backends and precisions side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditc.runtime.commands.bundle_argument import add_bundle_argument, read_bundle_argument
from ditc.runtime.errors import UsageError
from ditc.runtime.files import check_writable
from ditc.runtime.load_options import add_load_arguments, load_options
from ditc.runtime.prompts import read_prompts
from ditc.runtime.sessions.registry import rows
from ditc.runtime.spec import Precision

if TYPE_CHECKING:
    from ditc.runtime.bench.measure import Effort

# How every candidate is loaded. Backend and precision are what is compared.
LOAD = ("threads", "provider", "device", "low_vram", "require_signature", "self_test")
MOST_REPEATS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for what is compared, how often, and for the output."""
    add_bundle_argument(parser)
    several = "several with commas between them, or the option several times"
    for name, metavar, text in (
        (
            "backend",
            "NAMES",
            f"Libraries to compare, among {', '.join(row.name for row in rows())}; {several}",
        ),
        (
            "precision",
            "NAMES",
            f"Precisions of the denoiser to compare, among {', '.join(Precision)}; {several}",
        ),
    ):
        parser.add_argument(
            f"--{name}",
            dest=f"{name}s",  # "backend" is a field of the options with which each candidate is loaded
            action="append",
            type=_words,
            metavar=metavar,
            help=f"{text} (default: all that the bundle holds and this machine can run).",
        )
    parser.add_argument(
        "--size",
        action="append",
        type=_words,
        metavar="SIZES",
        help=f"Sizes of pictures in pixels, as HEIGHTxWIDTH or one number; {several} (default: the bundle's).",
    )
    for name, text, default in (
        ("batch", "Numbers of pictures that are drawn together", "1"),
        ("steps", "Numbers of denoising steps", "the bundle's"),
    ):
        parser.add_argument(
            f"--{name}",
            action="append",
            type=_numbers,
            metavar="NUMBERS",
            help=f"{text}; {several} (default: {default}).",
        )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="Take the prompts from this file, one per line; every picture needs a new one (default: texts that are "
        "made up).",
    )
    for name, times, metavar, text in (
        (
            "repeats",
            10,
            "DRAWINGS",
            "Drawings of every case that count, with new and with cached prompts each",
        ),
        ("warmup", 2, "DRAWINGS", "Drawings before those, which do not count"),
        (
            "loads",
            3,
            "PROCESSES",
            "New processes that load the bundle, for the time to load it and the first picture",
        ),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=times, metavar=metavar, help=f"{text} (default: %(default)s)."
        )
    parser.add_argument(
        "--order-seed",
        type=int,
        default=0,
        metavar="SEED",
        help="Seed of the random order in which the candidates take turns, a whole number (default: %(default)s).",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="Then run every stage of the first case with its library's profiler on, and show the time by PyTorch "
        "module (default: do not).",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="Only with --profile. Also write the profiles as a page to look at in a browser (default: none).",
    )
    add_load_arguments(parser, *LOAD)
    parser.add_argument(
        "--record",
        action="store_true",
        help="Keep the result in the bundle, in benchmark.json, where --backend auto and ditc serve read it "
        "(default: only print it).",
    )
    parser.add_argument("--json", action="store_true", help="Print the result as JSON (default: as text).")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the result, and keep it in the bundle if that is asked for.

    Raises:
        UsageError: something that is asked for is unknown, or the bundle was not built for it. Nothing has been
            measured then.
        DitcError: a candidate cannot load the bundle or draw a picture.
    """
    from ditc.runtime.atomic import write_atomic
    from ditc.runtime.bench.ceilings import measure_ceilings
    from ditc.runtime.bench.choices import select_candidates, select_cases
    from ditc.runtime.bench.measure import measure
    from ditc.runtime.bench.profile_page import page
    from ditc.runtime.bench.profile_report import as_text as profiles_as_text
    from ditc.runtime.bench.profile_report import profile_candidate
    from ditc.runtime.bench.prompts import Prompts
    from ditc.runtime.bench.report import as_json, as_text
    from ditc.runtime.bench.summary import entry
    from ditc.runtime.bundle.bench_record import BENCHMARK, save_entry
    from ditc.runtime.bundle.manifest import load_manifest
    from ditc.runtime.cores import default_threads
    from ditc.runtime.video import refuse_videos

    effort, options = _effort(arguments), load_options(arguments)
    if arguments.html is not None:
        if not arguments.profile:
            raise UsageError("--html shows profiles, and none is made", hint="add --profile")
        check_writable(arguments.html, "--html")
    texts = [] if arguments.prompts is None else read_prompts(arguments.prompts)
    bundle = read_bundle_argument(arguments)
    manifest = load_manifest(bundle)
    refuse_videos(manifest, "ditc bench")
    candidates = select_candidates(manifest, _all(arguments.backends), _all(arguments.precisions), options)
    cases = select_cases(
        manifest, candidates, _all(arguments.size), _all(arguments.batch), _all(arguments.steps)
    )
    profiled = candidates if arguments.profile else []
    prompts = Prompts(texts, effort.prompts(cases) + len(profiled) * cases[0].batch)
    if arguments.record:
        check_writable(bundle / BENCHMARK, "BUNDLE")
    with _progress(effort.drawings(len(candidates), len(cases)) + len(profiled)) as progress:
        progress("measuring this machine", 0)
        ceilings = measure_ceilings(options.threads)
        results = measure(
            bundle,
            candidates,
            cases,
            effort,
            prompts,
            seed=arguments.order_seed,
            progress=progress,
        )
        profiles = []
        for candidate in profiled:
            progress(f"profiling {candidate.name}", 0)
            texts = prompts.take(cases[0].batch)
            profiles.append(profile_candidate(bundle, manifest, candidate, cases[0], texts))
            progress("", 1)
    made = entry(candidates, results, options.threads or default_threads())
    report = as_json(bundle, manifest, candidates, results, ceilings, made, effort)
    if arguments.record:
        report["recorded"] = str(save_entry(bundle, manifest, made))
    if profiles:
        report["profiles"] = profiles
    if arguments.html is not None:
        write_atomic(arguments.html, page(report))
    if arguments.json:
        sys.stdout.write(json.dumps(report) + "\n")
        return 0
    sys.stdout.write("\n".join([*as_text(report), *profiles_as_text(profiles)]) + "\n")
    if arguments.html is not None:
        sys.stdout.write(f"{arguments.html}\n")
    if arguments.record:
        sys.stdout.write(f"recorded in {report['recorded']}\n")
    return 0


def _effort(arguments: argparse.Namespace) -> Effort:
    from ditc.runtime.bench.measure import Effort

    for name, least in (("repeats", 1), ("warmup", 0), ("loads", 1)):
        value = getattr(arguments, name)
        if not least <= value <= MOST_REPEATS:
            raise UsageError(
                f"--{name} {value} is not from {least} to {MOST_REPEATS}", hint=f"leave --{name} out"
            )
    return Effort(repeats=arguments.repeats, warmup=arguments.warmup, loads=arguments.loads)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr with the time left, if that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ditc.runtime.console import SafeConsole

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = SafeConsole()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def report(what: str, done: int) -> None:
            progress.update(task, advance=done, description=what or None)

        yield report


def _all(given: list[list[Any]] | None) -> list[Any]:
    return [item for items in given or () for item in items]


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty entry")
    return words


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them") from e
