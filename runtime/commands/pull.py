"""`ditc pull ORG/NAME`: fetch a bundle from the hub and check every hash."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.runtime.errors import UsageError

if TYPE_CHECKING:
    from ditc.runtime.bundle.fetch import Fetch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the id, the directory and the form of the output."""
    parser.add_argument(
        "id",
        metavar="ORG/NAME",
        help="The bundle's id on the Hugging Face hub: org/name or org/name@revision.",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="New directory to copy the bundle to (default: only the hub's cache, where ditc run ORG/NAME finds it).",
    )
    parser.add_argument("--json", action="store_true", help="Print the result as JSON (default: as text).")


def run(arguments: argparse.Namespace) -> int:
    """Fetch the files that the manifest lists, hash them, copy them if asked to, and print where the bundle is."""
    from ditc.runtime.bundle.fetch import check_fetched, fetch
    from ditc.runtime.commands.bundle_argument import announce
    from ditc.runtime.files import check_writable
    from ditc.runtime.hub import HUB_ID, HubId

    match = HUB_ID.fullmatch(arguments.id)
    if match is None:
        raise UsageError(
            f"{arguments.id!r} is not a hub id", hint="write it as org/name or org/name@revision"
        )
    out: Path | None = arguments.output
    if out is not None:
        check_writable(out, "-o")

    def begin(found: Fetch) -> None:
        announce(found)
        if out is not None:
            check_writable(out, "-o", needed_bytes=found.total_bytes)

    found = fetch(HubId(match["repo"], match["revision"]), announce=begin)
    check_fetched(found)
    folder = found.folder if out is None else _copy(found, out)
    files = len(list(found.manifest.all_files()))
    if arguments.json:
        result = {
            "bundle": str(folder),
            "id": found.hub_id.repo,
            "commit": found.commit,
            "digest": found.manifest.digest,
            "files": files,
            "bytes": found.total_bytes,
            "fetched_bytes": found.missing_bytes,
        }
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.write(
            f"{folder}: {files} files, {found.total_bytes / 1e6:.1f} MB, all as they were built, "
            f"digest {found.manifest.digest[:12]}\n"
        )
    return 0


def _copy(found: Fetch, out: Path) -> Path:
    """Copy the bundle out of the cache, as files and not as links, and check the copies."""
    from ditc.runtime.atomic import atomic_folder
    from ditc.runtime.bundle.fetch import BESIDE
    from ditc.runtime.bundle.integrity import check_bundle
    from ditc.runtime.bundle.manifest import MANIFEST

    listed = [ref.path for ref in found.manifest.all_files()]
    beside = [name for name in (MANIFEST, *BESIDE) if (found.folder / name).is_file()]
    with atomic_folder(out, hint="choose another -o") as folder:
        for name in (*listed, *beside):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.folder / name, folder / name)
        check_bundle(folder, found.manifest)
    return out
