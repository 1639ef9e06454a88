"""`ditc verify BUNDLE`: hashes every file that the manifest lists and compares; --run also runs every stage.

The certificate is in no manifest, so its own digest is compared, and with a public key the signatures of its records.
"""

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
    from ditc.runtime.bundle.manifest import Manifest

# Options that choose which artifacts --run runs, and how. Without --run they have no effect, so they are refused.
# Without --provider: a certificate names artifacts and a machine, so a result of ONNX Runtime's CPU provider would also
# count for its CUDA provider.
RUN_OPTIONS = ("backend", "precision", "stage_precision", "threads", "device", "low_vram")


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
    parser.add_argument(
        "--sign",
        type=Path,
        metavar="KEY.pem",
        help="Only with --run. Sign its result with the ed25519 private key in this file (default: no signature).",
    )
    add_load_arguments(parser, *RUN_OPTIONS, when="Only with --run.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON (default: as text).")


def run(arguments: argparse.Namespace) -> int:
    """Compare the hashes of all files and the digest of the certificate, and run the self-test if that is asked for.

    Returns:
        0, or 1 if the self-test failed or checked nothing.

    Raises:
        BundleError: a file was changed or is not signed; the first one is named, and the exit code is 2.
    """
    from ditc.runtime.bundle.certificate import read_certificate
    from ditc.runtime.bundle.jsondata import to_json
    from ditc.runtime.bundle.manifest import load_manifest
    from ditc.runtime.bundle.selftest import describe
    from ditc.runtime.bundle.signature import check_signature, load_private_key
    from ditc.runtime.printable import one_line

    _check_used(arguments)
    options, private_key = load_options(arguments), None
    if arguments.sign is not None:
        private_key = load_private_key(arguments.sign)
    arguments.bundle = read_bundle_argument(arguments)
    manifest = load_manifest(arguments.bundle)
    if arguments.require_signature is not None:
        check_signature(arguments.bundle, manifest, arguments.require_signature)
    refs = list(manifest.all_files())
    total = sum(ref.size_bytes for ref in refs)
    _hash(arguments.bundle, manifest, total)
    read_certificate(arguments.bundle)
    tested = _self_test(arguments.bundle, options, private_key) if arguments.run else None
    certificate = _certificate(arguments.bundle, manifest, arguments.require_signature)
    if arguments.json:
        result: dict[str, Any] = {
            "bundle": str(arguments.bundle),
            "digest": manifest.digest,
            "files": len(refs),
            "bytes": total,
            "certificate": certificate,
        }
        if tested is not None:
            result["self_test"] = {**to_json(tested), "passed": tested.passed}
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        for line in tested.lines if tested is not None else ():
            sys.stdout.write(one_line(describe(line)) + "\n")
        sys.stdout.write(
            f"{arguments.bundle}: {len(refs)} files, {total / 1e6:.1f} MB, all as they were built, "
            f"digest {manifest.digest[:12]}; certificate: {certificate}\n"
        )
    return 0 if tested is None or tested.passed else 1


def _check_used(arguments: argparse.Namespace) -> None:
    """Raise UsageError if an option has no effect without --run."""
    if arguments.run:
        return
    unused = [name for name in given_names(arguments) if name in RUN_OPTIONS]
    unused += ["sign"] if arguments.sign is not None else []
    if unused:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UsageError(f"without --run no stage is run, so nothing reads {flags}", hint="add --run")


def _hash(bundle: Path, manifest: Manifest, total: int) -> None:
    """Hash all files behind a progress bar."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from ditc.runtime.bundle.integrity import check_bundle
    from ditc.runtime.console import SafeConsole

    columns = (TextColumn("hashing"), BarColumn(), DownloadColumn())
    console = SafeConsole()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        check_bundle(bundle, manifest, done=lambda ref: progress.advance(task, ref.size_bytes))


def _certificate(bundle: Path, manifest: Manifest, public_key: Path | None) -> str:
    """How many records the certificate has, and with a public key, how many its owner has signed."""
    from ditc.runtime.bundle.certificate import read_certificate
    from ditc.runtime.bundle.certification import RENEWAL, count_signed

    certificate = read_certificate(bundle)
    if certificate is None:
        return "none"
    if certificate.manifest != manifest.digest:
        return "ignored, because it is of another build"
    if certificate.outdated:
        return f"ignored, because it is {RENEWAL}"
    count = sum(r is not None for entry in certificate.entries for r in (entry.parity, entry.self_test))
    records, written = ("1 record", "it was") if count == 1 else (f"{count} records", "they were")
    if public_key is None:
        return f"{records}, as {written} written"
    return f"{records}, {count_signed(certificate, manifest, public_key)} signed with {public_key.name}"


def _self_test(bundle: Path, options: LoadOptions, private_key: Any) -> Record:
    """Run the self-test, and write its result for this machine into the certificate."""
    from rich.text import Text

    from ditc.runtime.bundle.certificate import add_record
    from ditc.runtime.bundle.certification import sign_record
    from ditc.runtime.bundle.selftest import run_self_test
    from ditc.runtime.console import SafeConsole
    from ditc.runtime.loader import load_parts

    with SafeConsole().status("opening the stages") as status:
        parts = load_parts(bundle, options)
        result = run_self_test(
            bundle,
            parts.manifest,
            parts.sessions,
            parts.artifacts,
            on_stage=lambda stage: status.update(Text(f"self-test: {stage}")),
        )
    if private_key is not None:
        result = sign_record(result, private_key, parts.manifest, parts.artifacts, "self_test")
    add_record(bundle, parts.manifest, parts.artifacts, self_test=result)
    return result
