"""benchmark.json: what `ditc bench --record` measured, beside the certificate.

    {"schema_version": 1, "manifest": digest of the manifest, "entries": [
        {"machine": {...}, "cpu_features": [...], "threads": 2, "date": ..., "candidates": [
            {"backend": ..., "precision": ..., "artifact_set": ..., "library": ..., "load_s": ..., "cases": [...]}]}],
     "digest": ...}

There is one entry per machine and number of threads: the last run. Drawing does not need the file. If it is damaged, a
warning says so and it is ignored. It is replaced as a whole; of two processes that write at the same moment, one may
lose its entry. Times are no proof of anything, so they are not signed: who can write into the bundle can only make
`--backend auto` take a slower backend.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean

from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import (
    check_numbers,
    digest_fits,
    from_json,
    read_bounded,
    serialize_with_digest,
    to_json,
)
from ditc.runtime.bundle.manifest import Manifest
from ditc.runtime.cpu_features import cpu_features
from ditc.runtime.errors import BundleError
from ditc.runtime.machine import Machine, this_machine
from ditc.runtime.sessions.registry import find_row, library_version
from ditc.runtime.spec import Backend, Precision

log = logging.getLogger(__name__)

BENCHMARK = "benchmark.json"
SCHEMA_VERSION = 1
# An entry of four candidates and eight cases has about 30 kB.
MAX_BYTES = 4 * 1024**2
# The oldest entries give way: a bundle that is copied to many machines must not grow without end.
MAX_ENTRIES = 16
RENEW = "remove it; ditc bench BUNDLE --record writes a new one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Seconds of several repeats: the median, and the values below which a tenth and nine tenths of them are.

    Raises:
        ValueError: the values are not in order, or there are none.
    """

    median_s: float
    p10_s: float
    p90_s: float
    repeats: int

    def __post_init__(self) -> None:
        if not 0 < self.p10_s <= self.median_s <= self.p90_s or self.repeats < 1:
            raise ValueError(f"{self.p10_s} s, {self.median_s} s and {self.p90_s} s are not in order")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseTimes:
    """One size, batch and number of steps.

    Attributes:
        height, width: in pixels.
        batch: pictures that were drawn together.
        new_prompt: whole pictures whose texts had to be encoded, all `batch` of them together.
        cached_prompt: the same with texts that were encoded before.
        stages: one step of the denoiser; all runs of any other stage for one drawing.
    """

    height: int
    width: int
    batch: int
    steps: int
    new_prompt: Spread
    cached_prompt: Spread
    stages: dict[str, Spread]

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.batch, self.steps) < 1:
            raise ValueError("a size, batch or number of steps is below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One backend in one precision.

    Attributes:
        artifact_set: the hash of all files of the artifacts that ran, as in certificates.
        library: the version of the backend's library.
        load_s: from a new process with ditc imported until all stages were loaded.
        first_picture_s: the first picture after that.
        peak_bytes: the largest memory of the process until then; None where the system does not say.
    """

    backend: Backend
    precision: Precision
    artifact_set: str
    library: str | None
    load_s: float
    first_picture_s: float
    peak_bytes: int | None
    cases: tuple[CaseTimes, ...]

    def __post_init__(self) -> None:
        if not self.cases or self.load_s < 0 or self.first_picture_s < 0 or (self.peak_bytes or 0) < 0:
            raise ValueError(f"the times of {self.backend} {self.precision} cannot be")

    @property
    def picture_s(self) -> float:
        """The time of a drawing with new prompts, as the geometric mean over all cases."""
        return geometric_mean([case.new_prompt.median_s for case in self.cases])


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchEntry:
    """One run of the benchmark: all its candidates were measured side by side.

    Attributes:
        threads: the number of CPU threads that each stage computed with.
        date: in UTC, as ISO 8601.
    """

    machine: Machine
    cpu_features: tuple[str, ...]
    threads: int
    date: str
    candidates: tuple[Measured, ...]

    def candidate(self, backend: str, precision: Precision) -> Measured | None:
        """What was measured of a backend in a precision."""
        same = (m for m in self.candidates if m.backend == backend and m.precision is precision)
        return next(same, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRecord:
    """The content of benchmark.json. `manifest` is the digest of the manifest that it belongs to."""

    schema_version: int = SCHEMA_VERSION
    manifest: str
    entries: tuple[BenchEntry, ...] = ()
    digest: str = ""

    def with_entry(self, entry: BenchEntry) -> BenchRecord:
        """The record with a new entry, which replaces that of the same machine and number of threads."""
        others = [e for e in self.entries if (e.machine, e.threads) != (entry.machine, entry.threads)]
        return replace(self, entries=(*others, entry)[-MAX_ENTRIES:])


def find_entry(bundle: Path, manifest: Manifest, threads: int) -> BenchEntry | None:
    """What was measured on a machine of this kind with so many threads: the newest entry that fits; None without one.

    A machine is of this kind if its CPU has the same features, its GPUs are the same, and so are the versions of the
    libraries that were measured.
    """
    try:
        record = read_record(bundle)
    except BundleError as e:
        log.warning("%s; it is ignored", e)
        return None
    if record is None or record.manifest != manifest.digest:
        return None
    here = this_machine()
    for entry in reversed(record.entries):
        same = entry.machine.system == here.system and entry.machine.gpus == here.gpus
        if same and entry.cpu_features == cpu_features() and entry.threads == threads:
            current = tuple(m for m in entry.candidates if _is_current(m))
            if current:
                return replace(entry, candidates=current)
    return None


def read_record(bundle: Path) -> BenchRecord | None:
    """Read benchmark.json, whichever manifest it belongs to; None if there is none.

    Raises:
        BundleError: the file was changed after it was written, is damaged, or is of a newer version of ditc.
    """
    path = bundle / BENCHMARK
    if not path.is_file():
        return None
    try:
        data, content = read_bounded(path, MAX_BYTES)
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError("it is of another version of ditc")
        if not digest_fits(data, content):
            raise ValueError("it was changed after ditc wrote it: its digest does not fit")
        check_numbers(data)
        return from_json(BenchRecord, data)
    except (OSError, ValueError, OverflowError, RecursionError) as e:
        raise BundleError(f"{path} is not a record of times: {e}", hint=RENEW) from e


def save_entry(bundle: Path, manifest: Manifest, entry: BenchEntry) -> Path:
    """Add an entry to the bundle's record. A record of another manifest, or a damaged one, is replaced.

    Raises:
        OutputError: the bundle cannot be written to.
    """
    try:
        record = read_record(bundle)
    except BundleError as e:
        log.warning("%s; it is replaced", e)
        record = None
    if record is None or record.manifest != manifest.digest:
        record = BenchRecord(manifest=manifest.digest)
    text = serialize_with_digest(to_json(record.with_entry(entry)))
    return write_atomic(bundle / BENCHMARK, text, hint="make the bundle's folder writable")


def _is_current(measured: Measured) -> bool:
    """Whether the library that was measured is the one that is installed."""
    row = find_row(measured.backend)
    return row is not None and library_version(row.name) == measured.library
