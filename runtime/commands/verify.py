"""`ditc verify BUNDLE`: read every byte that the manifest speaks of and compare."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bundle, and the form of the answer."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--require-signature", type=Path, metavar="PUB.pem", help="also check who signed the bundle"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Hash all files with a progress bar; the first that differs is named and ends with exit code 2."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from ditc.runtime.integrity import check_files
    from ditc.runtime.manifest import load_manifest
    from ditc.runtime.signature import check_signature

    manifest = load_manifest(arguments.bundle)
    if arguments.require_signature is not None:
        check_signature(arguments.bundle, manifest, arguments.require_signature)
    refs = list(manifest.all_files())
    total = sum(ref.size_bytes for ref in refs)
    columns = (TextColumn("hashing"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        check_files(arguments.bundle, refs, done=lambda ref: progress.advance(task, ref.size_bytes))
    if arguments.json:
        result = {
            "bundle": str(arguments.bundle),
            "digest": manifest.digest,
            "files": len(refs),
            "bytes": total,
        }
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.write(
            f"{arguments.bundle}: {len(refs)} files, {total / 1e6:.1f} MB, all as built, "
            f"digest {manifest.digest[:12]}\n"
        )
    return 0
