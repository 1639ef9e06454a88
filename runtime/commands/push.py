"""`ditc push BUNDLE ORG/NAME`: check a bundle and upload what its manifest lists to the hub."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.runtime.errors import UsageError

if TYPE_CHECKING:
    from ditc.runtime.bundle.manifest import FileRef


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bundle, the id and the form of the output."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="The bundle's directory.")
    parser.add_argument(
        "id",
        metavar="ORG/NAME",
        help="Id on the Hugging Face hub: org/name, or org/name@branch. A repository that is not there is made.",
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="Make a new repository private (default: public, unless the organisation says otherwise).",
    )
    parser.add_argument("--json", action="store_true", help="Print the result as JSON (default: as text).")


def run(arguments: argparse.Namespace) -> int:
    """Hash the bundle, upload it in one commit, and print the commit's page."""
    from ditc.runtime.bundle.publish import push
    from ditc.runtime.hub import HUB_ID, HubId

    match = HUB_ID.fullmatch(arguments.id)
    if match is None:
        raise UsageError(f"{arguments.id!r} is not a hub id", hint="write it as org/name or org/name@branch")

    def announce(files: tuple[FileRef, ...]) -> None:
        size = sum(ref.size_bytes for ref in files) / 1e6
        sys.stderr.write(f"pushing {len(files)} files, {size:.1f} MB, to {arguments.id}\n")

    hub_id = HubId(match["repo"], match["revision"])
    done = push(arguments.bundle, hub_id, private=arguments.private, announce=announce)
    if arguments.json:
        result = {
            "id": hub_id.repo,
            "url": done.url,
            "commit": done.commit,
            "digest": done.digest,
            "files": len(done.files),
            "bytes": done.total_bytes,
            "wrote_card": done.wrote_card,
        }
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        card = "with a new model card" if done.wrote_card else "the model card there is kept"
        sys.stdout.write(
            f"{done.url}: {len(done.files)} files, {done.total_bytes / 1e6:.1f} MB, {card}, digest {done.digest[:12]}\n"
        )
    return 0
