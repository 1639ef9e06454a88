"""The key of an artifact: one hash of everything it was made from. Under an equal key, a new build changes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.integrity import sha256
from ditc.runtime.bundle.jsondata import to_json

TOOLS = (
    "ditc",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "safetensors",
    "tokenizers",
    "tensorrt-rtx",
    "tensorrt",
)


def digest(value: Any) -> str:
    """The sha256 of plain data or dataclasses. It does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(to_json(value), sort_keys=True).encode()).hexdigest()


@cache
def tool_versions() -> dict[str, str]:
    """The installed versions of all packages that shape an artifact."""
    found = {}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class FileHashes:
    """The sha256 of files, remembered between builds for as long as size, mtime and inode stay the same.

    It only decides whether a rebuild is needed. A file that will be executed is never trusted because of it.

    Args:
        remembered: read what earlier builds stored. Without it, every file is hashed once in this process.
    """

    def __init__(self, store: Path, *, remembered: bool = True) -> None:
        self._store = store
        self._known: dict[str, Any] = {}
        if remembered and store.is_file():
            try:
                known = json.loads(store.read_bytes())
            except (OSError, ValueError, RecursionError):
                known = None
            # An unreadable store only means that files are hashed once more.
            self._known = (
                {name: v for name, v in known.items() if _is_known(v)} if isinstance(known, dict) else {}
            )

    def of(self, path: Path) -> str:
        """The file's sha256. It is computed only if the file's size, mtime or inode has changed."""
        stat = path.stat()
        identity = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(str(path.resolve()))
        if not known or known[:3] != identity:
            known = [*identity, sha256(path)]
            self._known[str(path.resolve())] = known
        return str(known[3])

    def of_all(self, paths: Iterable[Path]) -> dict[str, str]:
        """The sha256 of several files of one directory, by file name."""
        return {path.name: self.of(path) for path in paths}

    def save(self) -> None:
        """Write the hashes to disk for the next build."""
        write_atomic(self._store, json.dumps(self._known), durable=False)


def _is_known(value: object) -> bool:
    """Whether a value of the store is what `FileHashes.of` keeps: size, mtime, inode and hash."""
    return isinstance(value, list) and len(value) == 4 and isinstance(value[3], str)


def explain(old: Any, new: Any) -> str:
    """Say in words which fields differ between two inputs of the same kind."""
    names = sorted(field.name for field in fields(new))
    changed = [name for name in names if getattr(old, name) != getattr(new, name)]
    return (
        ", ".join(name.replace("_", " ") for name in changed) + " changed" if changed else "nothing changed"
    )
