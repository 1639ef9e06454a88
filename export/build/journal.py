"""The folder `.build` of a bundle: what was made from what, so that a killed build resumes and a second one ends early.

bundle/.build/STAGE-KEY.json      one finished artifact: its inputs, its files, seconds and peak memory
bundle/.build/request-KEY.json    one finished build: what was asked for, and the manifest that answered it
bundle/.build/inputs.json         sha256 of files by size, mtime and inode
bundle/.build/lock                held while building; the operating system frees it when the owner dies

Free of torch.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from ditc.export.build.build_key import FileHashes, digest, explain
from ditc.runtime.bundle.jsondata import Mismatch, from_json, to_json
from ditc.runtime.bundle.manifest import MANIFEST, Artifact, FileRef
from ditc.runtime.errors import BuildError, DitcError

FOLDER = ".build"


class Journal:
    """Records of one bundle's builds."""

    def __init__(self, bundle: Path) -> None:
        self.bundle, self.folder = bundle, bundle / FOLDER
        self.hashes = FileHashes(self.folder / "inputs.json")

    def record(self, name: str, key: str) -> dict[str, Any] | None:
        """What was written under the key, None if nothing or nothing whole was."""
        return read_object(self._path(name, key))

    def write(self, name: str, inputs: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Remember what was made from the inputs, under their digest."""
        write_json(self._path(name, digest(inputs)), {"inputs": to_json(inputs), **content})

    def finished(self, name: str, key: str) -> Artifact | None:
        """The artifact made under the key, if all of its files are still what they were."""
        record = self.record(name, key)
        try:
            artifact = from_json(Artifact, record["artifact"]) if record else None
        except (Mismatch, KeyError):
            return None
        return artifact if artifact is not None and all(map(self.intact, artifact.files)) else None

    def intact(self, ref: FileRef) -> bool:
        """Whether the file has its size and hash; an unchanged size, mtime and inode stand for the hash."""
        path = self.bundle / ref.path
        return path.is_file() and path.stat().st_size == ref.size_bytes and self.hashes.of(path) == ref.sha256

    def why(self, name: str, inputs: Mapping[str, Any]) -> str:
        """What differs from the last time that something of this name was made."""
        earlier = sorted(self.folder.glob(f"{name}-*.json"), key=lambda path: path.stat().st_mtime)
        record = read_object(earlier[-1]) if earlier else None
        if record is None:
            return "not built yet"
        reason = explain(record.get("inputs", {}), to_json(inputs))
        return "its files are missing or damaged" if reason == "nothing changed" else reason

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key[:16]}.json"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the directory's lock, and clear away what a killed build has left half-written.

    Raises:
        BuildError: another build holds it.
    """
    lock = filelock.FileLock(out / FOLDER / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as e:
        raise BuildError(
            f"another build is working in {out}", hint="wait for it; a killed build frees its lock by itself"
        ) from e
    try:
        for leftover in (*out.rglob("*.partial"), *(out / FOLDER).glob("probe.*")):
            if leftover.is_file():
                leftover.unlink()
        for folder in (out / "onnx").glob(".*.partial"):
            shutil.rmtree(folder)
        yield
    finally:
        lock.release()


def check_ours(out: Path) -> None:
    """Refuse to build among someone's files: the build removes what its manifest does not name."""
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out} is a file", hint="choose a directory for -o")
    if out.is_dir() and not (out / MANIFEST).exists() and not (out / FOLDER).exists() and any(out.iterdir()):
        raise BuildError(f"{out} is not empty and not a bundle", hint="choose a new directory for -o")


def check_writable(out: Path) -> None:
    """Make the directory, and write and remove a file in it."""
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        probe = out / FOLDER / f"probe.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise BuildError(f"cannot write into {out}: {e.strerror}", hint="choose another -o directory") from e


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is none."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one move."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Write text in one move, unless the file holds it already."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def unwritten(error: OSError, out: Path) -> DitcError:
    """What went wrong with a file, for people."""
    where = error.filename or out
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BuildError(
            f"no space left on the disk of {out} ({where})", hint="free some space, then build again"
        )
    return BuildError(
        f"{where}: {error.strerror or error}", hint="check the disk and the permissions, build again"
    )
