"""The build journal, a bundle's folder `.build`. It records what each artifact was made from, so that a killed build
resumes and a build with nothing to do ends early.

bundle/.build/STAGE-KEY.json      one finished artifact: its inputs, its files, seconds and peak memory
bundle/.build/request-KEY.json    one finished build: its inputs, and the digest of its manifest
bundle/.build/NAME-KEY.json.sig   the signature of a record, if the build that made it signs its bundle
bundle/.build/files.json          the names of the files that builds wrote: only these may a later build remove
bundle/.build/inputs.json         sha256 of files, with the size, mtime and inode at which it was computed
bundle/.build/timing.cache        TensorRT's kernel timings
bundle/.build/lock                held while building; the operating system frees it when the owner dies

Whoever can write into a bundle can write into its journal. So a build that signs believes only records that its own
key has signed, and no stored hash: nothing that another hand put there gets its signature.

This module does not import torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import filelock

from ditc.export.build.build_key import FileHashes, digest, explain
from ditc.export.build.layout import build_folders
from ditc.export.build.records import EngineRecord, Inputs, Record, RequestRecord, StageRecord
from ditc.runtime.atomic import output_error, remove_leftovers, write_atomic
from ditc.runtime.bundle.build_cost import FOLDER, record_path
from ditc.runtime.bundle.jsondata import from_json, to_json
from ditc.runtime.bundle.manifest import MANIFEST, FileRef, Manifest
from ditc.runtime.bundle.signature import is_signed, sign_digest
from ditc.runtime.errors import BuildError, DitcError, OutputError

R = TypeVar("R", bound=Record)
A = TypeVar("A", StageRecord, EngineRecord)
OUTPUT_HINT = "choose another -o directory"
RECORD_PURPOSE = "ditc build record, sha256 "


class Journal:
    """Records of one bundle's builds.

    Args:
        key: the private ed25519 key of a build that signs. Records are then signed with it, others are not read, and no
            hash or timing of earlier builds is used.
    """

    def __init__(self, bundle: Path, key: Any = None) -> None:
        self.bundle, self.folder, self._key = bundle, bundle / FOLDER, key
        self.hashes = FileHashes(self.folder / "inputs.json", remembered=key is None)
        self.timing_cache = self.folder / "timing.cache" if key is None else None
        self._files = self.folder / "files.json"

    def record(self, kind: type[R], name: str, key: str) -> R | None:
        """The record under the name and key; None if there is none that this version can read, or that counts."""
        record = self._read(kind, record_path(self.bundle, name, key))
        # A record may have been copied to another name.
        if record is None or record.inputs.record_name != name or not digest(record.inputs).startswith(key):
            return None
        return record

    def record_of(self, kind: type[R], inputs: Inputs) -> R | None:
        """The record of what was made from the inputs, or None."""
        return self.record(kind, inputs.record_name, digest(inputs))

    def write(self, record: Record) -> None:
        """Write a record under the name and digest of its inputs."""
        path = record_path(self.bundle, record.inputs.record_name, digest(record.inputs))
        content = json.dumps(to_json(record), indent=1, ensure_ascii=False).encode()
        if self._key is not None:
            write_atomic(_signature_path(path), sign_digest(self._key, RECORD_PURPOSE, _sha256(content)))
        write_atomic(path, content)

    def counts(self, manifest: Manifest) -> bool:
        """Whether artifacts of this manifest may stay: for a build that signs, only those of another such build."""
        records = (self._read(RequestRecord, path) for path in self.folder.glob("request-*.json"))
        return self._key is None or any(r is not None and r.manifest == manifest.digest for r in records)

    def _read(self, kind: type[R], path: Path) -> R | None:
        try:
            content = path.read_bytes()
            if self._key is not None:
                signature = _signature_path(path).read_text()
                if not is_signed(self._key.public_key(), RECORD_PURPOSE, _sha256(content), signature):
                    return None
            return from_json(kind, json.loads(content))
        except (OSError, ValueError, RecursionError):  # from_json raises Mismatch, a ValueError
            return None

    def records(self) -> list[Path]:
        """The paths of all records."""
        return sorted(self.folder.glob("*-*.json"))

    def written(self) -> set[str]:
        """The names of the files that builds wrote or were about to write, relative to the bundle."""
        try:
            names = json.loads(self._files.read_bytes())
        except (OSError, ValueError, RecursionError):
            return set()
        return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()

    def will_write(self, *paths: Path) -> None:
        """Note files before they are written. If the build is killed, the next one may remove them."""
        self.set_written(self.written() | {path.relative_to(self.bundle).as_posix() for path in paths})

    def set_written(self, names: Iterable[str]) -> None:
        """Replace the noted names."""
        write_atomic(self._files, json.dumps(sorted(names), indent=1), durable=False)

    def finished(self, kind: type[A], inputs: Inputs) -> A | None:
        """The record of the artifact made from the inputs, if all of its files are unchanged; else None."""
        record = self.record_of(kind, inputs)
        return record if record is not None and all(map(self.intact, record.artifact.files)) else None

    def intact(self, ref: FileRef) -> bool:
        """Whether the file has the recorded size and hash. It is hashed only if size, mtime or inode has changed."""
        path = self.bundle / ref.path
        return path.is_file() and path.stat().st_size == ref.size_bytes and self.hashes.of(path) == ref.sha256

    def why(self, kind: type[R], inputs: Inputs) -> str:
        """Why something must be made: how the inputs differ from those of the last record of that name."""
        earlier = sorted(
            self.folder.glob(f"{inputs.record_name}-*.json"), key=lambda path: path.stat().st_mtime
        )
        if not earlier:
            return "not built yet"
        record = self._read(kind, earlier[-1])
        if record is None and self._key is not None:
            return "the record of its last build is not signed with this key"
        if record is None:
            return "the record of its last build cannot be read"
        reason = explain(record.inputs, inputs)
        return "its files are missing or damaged" if reason == "nothing changed" else reason


def _signature_path(record: Path) -> Path:
    return record.with_name(record.name + ".sig")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the directory's lock, and first remove half-written files that a killed build has left.

    Raises:
        BuildError: another build holds the lock.
    """
    lock = filelock.FileLock(_lock_path(out))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as e:
        raise BuildError(
            f"another build is working in {out}",
            hint="wait until it has ended; the lock of a killed build is freed by itself",
        ) from e
    try:
        for folder in _places(out):
            remove_leftovers(folder)
        yield
    finally:
        lock.release()


def check_bundle_or_empty(out: Path) -> None:
    """Refuse a directory with other files in it, among which a bundle's would be lost.

    Raises:
        BuildError: `out` is a file, or a directory that is neither empty nor a bundle.
    """
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out} is a file", hint="choose a directory for -o")
    if out.is_dir() and not (out / MANIFEST).exists() and not (out / FOLDER).exists() and any(out.iterdir()):
        raise BuildError(f"{out} is not empty and not a bundle", hint="choose a new directory for -o")


def check_writable(out: Path) -> None:
    """Make the directory, and write a temporary file in it and in each folder that an earlier build made there.

    Raises:
        OutputError: the directory or a folder cannot be made, cannot be written to, or is a link.
    """
    for link in (path for path in (*_places(out), _lock_path(out)) if path != out and path.is_symlink()):
        raise OutputError(
            f"cannot write into {link}: it is a link, and builds write and delete files only in the bundle",
            hint=f"put what it names in its place, or make {out} itself a link",
        )
    place = out / FOLDER
    try:
        place.mkdir(parents=True, exist_ok=True)
        for place in _places(out):
            tempfile.TemporaryFile(dir=place).close()
    except OSError as e:
        raise OutputError(f"cannot write into {place}: {e.strerror}", hint=OUTPUT_HINT) from e


def _places(out: Path) -> list[Path]:
    """The folders that builds write to."""
    return [out / FOLDER, out, *build_folders(out)]


def _lock_path(out: Path) -> Path:
    return out / FOLDER / "lock"


def as_ditc_error(error: OSError, out: Path) -> DitcError:
    """The error that tells a user which file could not be read or written, and what to do."""
    where = error.filename or out
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return output_error(Path(where), error, OUTPUT_HINT)
    return BuildError(
        f"{where}: {error.strerror or error}", hint="check the disk and the permissions, then build again"
    )
