"""The kernels that TensorRT-RTX has compiled for this GPU, in files that later processes read.

The name of a file is a hash of everything that its content depends on: the GPU, the driver, the library's version
(TensorRT-RTX 1.6 release notes) and the engine. If one of them changes, no file is found, and a new one is written.
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
    """The file of one engine: the SHA-256 of the kernels, followed by the kernels."""

    file: Path

    def load(self) -> bytes:
        """The kernels; b"" if the file is missing or damaged."""
        try:
            data = self.file.read_bytes()
        except OSError:
            return b""
        # TensorRT-RTX 1.7.1 accepts kernels with a flipped byte, and then cannot make a context.
        digest, kernels = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return kernels if hashlib.sha256(kernels).digest() == digest else b""

    def save(self, data: bytes) -> None:
        """Write the kernels. If that fails it is no error: the next start only has to compile them again."""
        if data != self.load():
            with suppress(OutputError):
                write_atomic(self.file, hashlib.sha256(data).digest() + data, durable=False)

    def discard(self) -> None:
        """Delete the file, because the library refuses its kernels."""
        with suppress(OSError):
            self.file.unlink()


def kernel_cache(folder: Path, *, gpu: str, driver: str, library: str, engine: str) -> KernelCache:
    """The cache of one engine, given by its artifact's key, for one GPU, driver and library version."""
    name = hashlib.sha256("\0".join((gpu, driver, library, engine)).encode()).hexdigest()[:32]
    return KernelCache(folder / f"{name}.bin")


def cache_folder() -> Path | None:
    """The folder of the kernel caches, inside the user's folder for caches.

    None if this user has no home folder, as in a container that runs under a number without a name.
    """
    variable, usual = (
        ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    )
    try:
        return Path(os.environ.get(variable) or Path.home() / usual) / "ditc" / "kernels"
    except RuntimeError:  # from Path.home()
        return None
