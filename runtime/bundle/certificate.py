"""certificate.json: what parity and self-tests have shown about a bundle.

    {"manifest": digest, "entries": [
        {"artifact_set": ..., "artifacts": {stage: sha256}, "machine": {...},
         "parity": {...} or null, "self_test": {...} or null}]}

It is a file of its own because the manifest never changes after the build. There is one entry per artifact set and
machine. Parity needs the checkpoint and PyTorch. A self-test needs only the bundle, and extends a parity result to
another machine. A certificate with the digest of another manifest is ignored.

Drawing does not need the file. If it is damaged or cannot be written, a warning says so and the work goes on. It is
replaced as a whole, so several machines may share it. Of two that write at the same moment, one may lose its record.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import from_json, to_json
from ditc.runtime.bundle.manifest import Artifact, Manifest
from ditc.runtime.errors import BundleError, OutputError
from ditc.runtime.machine import Machine, library_versions, this_machine

log = logging.getLogger(__name__)

CERTIFICATE = "certificate.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The worst comparison of one level (parity) or of one stage (self-test). passed is None if it was not checked."""

    name: str
    metric: str
    value: float | None
    bound: float | None
    passed: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of parity or of the self-test.

    Attributes:
        passed: whether the run passed as a whole.
        date: when it ran, in UTC, as ISO 8601.
        tools: the versions of the libraries that it ran with.
        reference: what the bundle was compared with.
    """

    passed: bool
    lines: tuple[Line, ...]
    date: str
    tools: dict[str, str]
    reference: dict[str, str]

    @property
    def checked(self) -> int:
        """The number of lines that were checked."""
        return sum(line.passed is not None for line in self.lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Everything that is known about one artifact set on one machine.

    Attributes:
        artifact_set: the hash of all files of the artifacts.
        artifacts: for each stage, the hash of its artifact's files.
    """

    artifact_set: str
    artifacts: dict[str, str]
    machine: Machine
    parity: Record | None = None
    self_test: Record | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The content of certificate.json. `manifest` is the digest of the manifest that it belongs to."""

    manifest: str
    entries: tuple[Entry, ...] = ()

    def of(self, artifacts: Mapping[str, Artifact]) -> tuple[Entry, ...]:
        """The entries of exactly these artifacts, on all machines."""
        wanted = artifact_set(artifacts)
        return tuple(entry for entry in self.entries if entry.artifact_set == wanted)

    def with_record(
        self,
        artifacts: Mapping[str, Artifact],
        *,
        parity: Record | None = None,
        self_test: Record | None = None,
    ) -> Certificate:
        """The certificate with new records for this machine, which replace older ones of the same kind."""
        machine, wanted = this_machine(), artifact_set(artifacts)
        old = next((e for e in self.entries if (e.artifact_set, e.machine) == (wanted, machine)), None)
        entry = old or Entry(artifact_set=wanted, artifacts=_hashes(artifacts), machine=machine)
        entry = replace(entry, parity=parity or entry.parity, self_test=self_test or entry.self_test)
        return replace(self, entries=(*(e for e in self.entries if e is not old), entry))


def load_certificate(bundle: Path, manifest: Manifest) -> Certificate:
    """Read the bundle's certificate. It is empty if there is no file, or if the file belongs to another manifest.

    It is also empty, with a warning, if the file is damaged or cannot be read.
    """
    path, empty = bundle / CERTIFICATE, Certificate(manifest=manifest.digest)
    if not path.is_file():
        return empty
    try:
        certificate = from_json(Certificate, json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as e:  # Mismatch is a ValueError
        log.warning("%s is ignored, because it is not a certificate: %s", path, e)
        return empty
    return certificate if certificate.manifest == manifest.digest else empty


def save_certificate(bundle: Path, certificate: Certificate) -> Path:
    """Write certificate.json.

    Raises:
        OutputError: the bundle cannot be written to.
    """
    text = json.dumps(to_json(certificate), indent=1, ensure_ascii=False) + "\n"
    return write_atomic(bundle / CERTIFICATE, text, hint="make the bundle's folder writable")


def add_record(
    bundle: Path,
    manifest: Manifest,
    artifacts: Mapping[str, Artifact],
    *,
    parity: Record | None = None,
    self_test: Record | None = None,
) -> None:
    """Write a new record for this machine into certificate.json, or warn that it cannot be kept there."""
    certificate = load_certificate(bundle, manifest)
    try:
        save_certificate(bundle, certificate.with_record(artifacts, parity=parity, self_test=self_test))
    except OutputError as e:
        kind = "parity" if parity is not None else "the self-test"
        log.warning("the result of %s is not kept, so it has to run again here: %s (%s)", kind, e, e.hint)


def record(passed: bool, lines: tuple[Line, ...], reference: Mapping[str, str] | None = None) -> Record:
    """Make a record with the current time and the versions of this machine's libraries."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(
        passed=passed, lines=lines, date=now, tools=library_versions(), reference=dict(reference or {})
    )


def why_uncertified(certificate: Certificate, artifacts: Mapping[str, Artifact]) -> str:
    """Why these artifacts are not certified for this machine; "" if they are.

    They are certified if parity has passed for exactly these files on some machine, and parity or the self-test has
    passed for them on this machine.
    """
    entries, here = certificate.of(artifacts), this_machine()
    broken = [e for e in entries for r in (e.parity, e.self_test) if r is not None and not r.passed]
    if any(entry.machine == here for entry in broken):
        return "parity or the self-test of these artifacts failed on this machine"
    proven = [entry for entry in entries if entry.parity is not None and entry.parity.passed]
    if not proven:
        return "there is no parity result for these artifacts: run ditc parity BUNDLE --against CHECKPOINT"
    tested = any(e.machine == here and e.self_test is not None and e.self_test.passed for e in entries)
    if tested or any(entry.machine == here for entry in proven):
        return ""
    return (
        f"parity has passed only on another machine ({proven[0].machine}): run ditc verify BUNDLE --run here"
    )


def check_certified(
    bundle: Path, manifest: Manifest, artifacts: Mapping[str, Artifact], *, required: bool
) -> str:
    """Read the bundle's certificate, and say why it does not certify the artifacts; "" if it does.

    Raises:
        BundleError: the artifacts are not certified, and `required` is set.
    """
    why = why_uncertified(load_certificate(bundle, manifest), artifacts)
    if why and required:
        raise BundleError(
            f"{bundle} is not certified: {why}", hint="run it without --require-certificate to accept that"
        )
    return why


def artifact_set(artifacts: Mapping[str, Artifact]) -> str:
    """One hash over all files of the artifacts."""
    return hashlib.sha256(json.dumps(_hashes(artifacts), sort_keys=True).encode()).hexdigest()


def _hashes(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    return {
        name: hashlib.sha256("".join(ref.sha256 for ref in artifact.files).encode()).hexdigest()
        for name, artifact in sorted(artifacts.items())
    }
