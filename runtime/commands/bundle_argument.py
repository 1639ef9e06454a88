"""The argument BUNDLE of the verbs that only read: a directory, or the id of a bundle on the hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditc.runtime.bundle.fetch import Fetch


def add_bundle_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that `read_bundle_argument` resolves."""
    parser.add_argument(
        "bundle",
        type=Path,
        metavar="BUNDLE",
        help="The bundle's directory, or its id on the Hugging Face hub: org/name or org/name@revision.",
    )


def read_bundle_argument(arguments: argparse.Namespace, *, whole: bool = True) -> Path:
    """The bundle's directory. A bundle on the hub is fetched into the hub's cache, and its sizes are shown on stderr.

    Raises:
        DitcError: as `local_bundle`.
    """
    from ditc.runtime.bundle.fetch import local_bundle

    return local_bundle(arguments.bundle, announce=announce, whole=whole)


def announce(fetch: Fetch) -> None:
    """Say what will be fetched, before it takes its time."""
    if fetch.missing:
        sys.stderr.write(f"{fetch}\n")
