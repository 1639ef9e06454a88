"""`ditc verify BUNDLE`: hashes every file that the manifest lists and compares; --run also runs every stage."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditc.runtime.commands.bundle_argument import add_bundle_argument, read_bundle_argument
from ditc.runtime.errors import UsageError
from ditc.runtime.load_options import LoadOptions, add_load_arguments, given_names, load_options

if TYPE_CHECKING:
    from ditc.runtime.bundle.certificate import Record

# Options that choose which artifacts --run runs, and how. Without --run they have no effect, so they are refused.
# Without --provider: a certificate names artifacts and a machine, so a result of ONNX Runtime's CPU provider would also
# count for its CUDA provider.
RUN_OPTIONS = ("backend", "precision", "threads", "device", "low_vram")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the bundle, for what is checked, and for the output's form."""
    add_bundle_argument(parser)
    add_load_arguments(parser, "require_signature")
    parser.add_argument(
        "--run",
        action="store_true",
        help="Also run every stage on its golden inputs on this machine, and write the result into certificate.json "
        "(default: only compare hashes).",
    )
    add_load_arguments(parser, *RUN_OPTIONS, when="Only with --run.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON (default: as text).")


def run(arguments: argparse.Namespace) -> int:
    """Hash all files behind a progress bar. The first file that differs is named, and the exit code is 2."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from ditc.runtime.bundle.integrity import check_bundle
    from ditc.runtime.bundle.jsondata import to_json
    from ditc.runtime.bundle.manifest import load_manifest
    from ditc.runtime.bundle.selftest import describe
    from ditc.runtime.bundle.signature import check_signature

    unused = [] if arguments.run else [name for name in given_names(arguments) if name in RUN_OPTIONS]
    if unused:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UsageError(f"without --run no stage is run, so nothing reads {flags}", hint="add --run")
    options = load_options(arguments)
    arguments.bundle = read_bundle_argument(arguments)
    manifest = load_manifest(arguments.bundle)
    if arguments.require_signature is not None:
        check_signature(arguments.bundle, manifest, arguments.require_signature)
    refs = list(manifest.all_files())
    total = sum(ref.size_bytes for ref in refs)
    columns = (TextColumn("hashing"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        check_bundle(arguments.bundle, manifest, done=lambda ref: progress.advance(task, ref.size_bytes))
    tested = _self_test(arguments.bundle, options) if arguments.run else None
    if arguments.json:
        result: dict[str, Any] = {
            "bundle": str(arguments.bundle),
            "digest": manifest.digest,
            "files": len(refs),
            "bytes": total,
        }
        if tested is not None:
            result["self_test"] = to_json(tested)
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        for line in tested.lines if tested is not None else ():
            sys.stdout.write(describe(line) + "\n")
        sys.stdout.write(
            f"{arguments.bundle}: {len(refs)} files, {total / 1e6:.1f} MB, all as they were built, "
            f"digest {manifest.digest[:12]}\n"
        )
    return 0 if tested is None or tested.passed else 1


def _self_test(bundle: Path, options: LoadOptions) -> Record:
    """Run the self-test, and write its result for this machine into the certificate."""
    from rich.console import Console

    from ditc.runtime.bundle.certificate import add_record
    from ditc.runtime.bundle.selftest import run_self_test
    from ditc.runtime.loader import load_parts

    with Console(stderr=True, highlight=False).status("opening the stages") as status:
        parts = load_parts(bundle, options)
        result = run_self_test(
            bundle,
            parts.manifest,
            parts.sessions,
            parts.artifacts,
            on_stage=lambda stage: status.update(f"self-test: {stage}"),
        )
    add_record(bundle, parts.manifest, parts.artifacts, self_test=result)
    return result
