"""Kernels that TensorRT-RTX compiled for this GPU, kept between processes.

A file is named by everything that its content depends on (TensorRT-RTX 1.6 release notes: GPU, library and driver
must match): another GPU, driver, library or engine has another file, so a mismatch is a miss.
"""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ditc.runtime.atomic import write_atomic
from ditc.runtime.errors import OutputError

_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class KernelCache:
    """One engine's file: SHA-256 of the kernels, and the kernels."""

    file: Path

    def load(self) -> bytes:
        """The kernels; b"" if there are none."""
        try:
            data = self.file.read_bytes()
        except OSError:
            return b""
        # TensorRT-RTX 1.7.1 takes kernels with a flipped byte, and then makes no context.
        digest, kernels = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return kernels if hashlib.sha256(kernels).digest() == digest else b""

    def save(self, data: bytes) -> None:
        """Write the kernels as a whole. A cache that cannot be written costs time at the next start, nothing else."""
        if data != self.load():
            with suppress(OutputError):
                write_atomic(self.file, hashlib.sha256(data).digest() + data, durable=False)

    def discard(self) -> None:
        """Forget a file that the library refuses."""
        with suppress(OSError):
            self.file.unlink()


def kernel_cache(folder: Path, *, gpu: str, driver: str, library: str, engine: str) -> KernelCache:
    """The cache of one engine (its artifact's key) on one GPU, driver and library."""
    name = hashlib.sha256("\0".join((gpu, driver, library, engine)).encode()).hexdigest()[:32]
    return KernelCache(folder / f"{name}.bin")


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "ditc" / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditc" / "kernels"
