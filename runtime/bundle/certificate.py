"""certificate.json: what parity and self-tests have shown about a bundle.

    {"schema_version": 2, "manifest": digest of the manifest, "entries": [
        {"artifact_set": ..., "artifacts": {stage: sha256}, "machine": {...},
         "parity": {...} or null, "self_test": {...} or null}], "digest": ...}

It is a file of its own because the manifest never changes after the build. There is one entry per artifact set and
machine. Parity needs the checkpoint and PyTorch. A self-test needs only the bundle, and extends a parity result to
another machine. What counts as proof is decided in `certification.py`, from the lines and settings of the records.

Its own digest reveals damage and careless edits. Whoever can write a certificate can also compute its digest; the
signature of a record is what shows whose word it is.

Drawing does not need the file. If it is damaged or cannot be written, a warning says so and the work goes on. It is
replaced as a whole, so several machines may share it. Of two that write at the same moment, one may lose its record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import (
    digest_fits,
    digest_of,
    from_json,
    read_bounded,
    serialize_with_digest,
    to_json,
)
from ditc.runtime.bundle.manifest import Artifact, Manifest
from ditc.runtime.errors import BundleError, OutputError
from ditc.runtime.machine import Machine, library_versions, this_machine
from ditc.runtime.tolerances import Metric, table_digest

log = logging.getLogger(__name__)

CERTIFICATE = "certificate.json"
# Version 1 had no digest of its own, and its records did not name the settings that decide what they prove.
SCHEMA_VERSION = 2
# One entry has about 5 kB. A file of another size is not read into memory.
MAX_BYTES = 64 * 1024**2
RENEW = "remove it; ditc parity BUNDLE --against CHECKPOINT and ditc verify BUNDLE --run write a new one"

Kind = Literal["parity", "self_test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The worst comparison of one level (parity) or of one stage (self-test). passed is None if it was not checked.

    Raises:
        ValueError: it claims to have passed, but its value does not keep its bound.
    """

    name: str
    metric: str
    value: float | None
    bound: float | None
    passed: bool | None
    detail: str = ""

    def __post_init__(self) -> None:
        if self.passed and not self._keeps_its_bound():
            raise ValueError(
                f"{self.name} is said to have passed, but {self.metric} {self.value} does not keep {self.bound}"
            )

    def _keeps_its_bound(self) -> bool:
        if self.value is None or self.bound is None or not math.isfinite(self.bound):
            return False
        return self.value >= self.bound if Metric(self.metric).at_least else 0.0 <= self.value <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class ParitySettings:
    """What a run of parity drew and how it judged. These settings decide what its result proves.

    Attributes:
        upstream: the second reference, such as diffusers; "" if the run did without one.
        height, width: the size of the pictures in pixels.
        budget: the relative L2 error that the user allowed for 8-bit stages; None if the tolerance table decided.
        loosened: whether the budget allowed more than the tolerance table does.
    """

    levels: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    upstream: str
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    budget: float | None = None
    loosened: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of parity or of the self-test.

    Attributes:
        date: when it ran, in UTC, as ISO 8601.
        tools: the versions of the libraries that it ran with.
        reference: what the bundle was compared with.
        tolerances: the hash of the tolerance table that it was judged by.
        settings: of a run of parity; None for a self-test, which has no choices.
        signature: an ed25519 signature of `statement`, in hexadecimal digits; "" if nobody signed it.
    """

    lines: tuple[Line, ...]
    date: str
    tools: dict[str, str]
    reference: dict[str, str]
    tolerances: str
    settings: ParitySettings | None = None
    signature: str = ""

    @property
    def failed(self) -> bool:
        """Whether a line failed."""
        return any(line.passed is False for line in self.lines)

    @property
    def passed(self) -> bool:
        """Whether something was checked, and nothing failed."""
        return not self.failed and self.checked > 0

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

    schema_version: int = SCHEMA_VERSION
    manifest: str
    entries: tuple[Entry, ...] = ()
    digest: str = ""

    @property
    def outdated(self) -> bool:
        """Whether an earlier version of ditc wrote it, without the settings of its runs. It then has no entries."""
        return self.schema_version < SCHEMA_VERSION

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

    It is also empty, with a warning, if the file was changed or cannot be read.
    """
    empty = Certificate(manifest=manifest.digest)
    try:
        certificate = read_certificate(bundle)
    except BundleError as e:
        log.warning("%s; it is ignored", e)
        return empty
    return empty if certificate is None or certificate.manifest != manifest.digest else certificate


def read_certificate(bundle: Path) -> Certificate | None:
    """Read certificate.json, whichever manifest it belongs to; None if there is none.

    Raises:
        BundleError: the file was changed after it was written, is damaged, or is of a newer version of ditc.
    """
    path = bundle / CERTIFICATE
    if not path.is_file():
        return None
    try:
        data, content = read_bounded(path, MAX_BYTES)
        if isinstance(data, dict) and data.keys() == {"manifest", "entries"}:
            return Certificate(schema_version=1, manifest=str(data["manifest"]))
        _check_unchanged(path, data, content)
        return from_json(Certificate, data)
    # Mismatch, and the errors of texts without an encoding, are ValueErrors; huge numbers give an OverflowError.
    except (OSError, ValueError, OverflowError, RecursionError) as e:
        raise BundleError(f"{path} is not a certificate: {e}", hint=RENEW) from e


def _check_unchanged(path: Path, data: object, content: bytes) -> None:
    """Raise BundleError unless the digest fits the content, and the bytes are those that ditc writes."""
    if not isinstance(data, dict):
        raise BundleError(f"{path} is not a certificate: it is no JSON object", hint=RENEW)
    version = data.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, but this version of ditc reads {SCHEMA_VERSION}",
            hint="update ditc",
        )
    if not digest_fits(data, content):
        raise BundleError(f"{path} was changed after ditc wrote it: its digest does not fit", hint=RENEW)


def save_certificate(bundle: Path, certificate: Certificate) -> Path:
    """Write certificate.json, with its digest.

    Raises:
        OutputError: the bundle cannot be written to.
    """
    text = serialize_with_digest(to_json(replace(certificate, schema_version=SCHEMA_VERSION)))
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


def record(
    lines: tuple[Line, ...],
    reference: Mapping[str, str] | None = None,
    settings: ParitySettings | None = None,
) -> Record:
    """Make a record with the current time and the versions of this machine's libraries."""
    return Record(
        lines=lines,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        tools=library_versions(),
        reference=dict(reference or {}),
        tolerances=table_digest(),
        settings=settings,
    )


def statement(manifest: str, artifacts: str, machine: Machine, kind: Kind, made: Record) -> str:
    """What the signature of a record signs: the hash of the record and of everything that it is about.

    Args:
        manifest: the digest of the manifest.
        artifacts: the hash of all files of the artifacts.
    """
    # As a file gives it back: a whole number in a field for fractions is read as a fraction.
    made = from_json(Record, to_json(replace(made, signature="")))
    about = {"manifest": manifest, "artifact_set": artifacts, "machine": to_json(machine), "kind": kind}
    return digest_of({**about, "record": to_json(made)})


def artifact_set(artifacts: Mapping[str, Artifact]) -> str:
    """One hash over all files of the artifacts."""
    return hashlib.sha256(json.dumps(_hashes(artifacts), sort_keys=True).encode()).hexdigest()


def _hashes(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    return {
        name: hashlib.sha256("".join(ref.sha256 for ref in artifact.files).encode()).hexdigest()
        for name, artifact in sorted(artifacts.items())
    }
