"""`ditc sign BUNDLE --key KEY.pem`: sign the manifest, which covers every file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the bundle and the key."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="The bundle's directory.")
    parser.add_argument(
        "--key",
        type=Path,
        required=True,
        metavar="KEY.pem",
        help="File with the ed25519 private key to sign with, in PEM format.",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check the hash of every file, sign the manifest, and print the path of the signature.

    Hashing takes minutes for a large bundle, so the key and the place of the signature are checked before.
    """
    from ditc.runtime.bundle.integrity import check_bundle
    from ditc.runtime.bundle.manifest import load_manifest
    from ditc.runtime.bundle.signature import SIGNATURE, load_private_key, sign
    from ditc.runtime.files import check_writable

    manifest = load_manifest(arguments.bundle)
    load_private_key(arguments.key)
    check_writable(arguments.bundle / SIGNATURE, "bundle: sign a copy of it")
    check_bundle(arguments.bundle, manifest)
    sys.stdout.write(f"{sign(arguments.bundle, arguments.key, manifest)}\n")
    return 0
