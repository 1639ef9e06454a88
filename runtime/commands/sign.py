"""`ditc sign BUNDLE --key KEY.pem`: sign the manifest, which covers every file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bundle and the key."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--key", type=Path, required=True, metavar="KEY.pem", help="ed25519 private key")


def run(arguments: argparse.Namespace) -> int:
    """Check every hash, then sign and print the signature's path."""
    from ditc.runtime.bundle.integrity import check_files
    from ditc.runtime.bundle.manifest import load_manifest
    from ditc.runtime.bundle.signature import sign

    check_files(arguments.bundle, load_manifest(arguments.bundle).all_files())
    sys.stdout.write(f"{sign(arguments.bundle, arguments.key)}\n")
    return 0
