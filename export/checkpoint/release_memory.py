"""Give back the memory that an export leaves behind: mapped checkpoint files, and freed memory that malloc keeps."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

MAPS = Path("/proc/self/maps")
MADV_DONTNEED = 4  # Linux, asm-generic/mman-common.h


def drop_pages(files: Iterable[Path]) -> int:
    """Release the memory of every mapping of these files, and the freed memory that malloc keeps.

    A tensor that is used later reads its bytes from the file again. So such a tensor must never have been written to,
    which TensorSource demands too. The release is needed because torch 2.13 keeps the weights of an exported module
    alive. It works on Linux; elsewhere it does nothing.

    Returns:
        The released address space in bytes.
    """
    if not MAPS.exists():
        return 0
    paths = {str(path.resolve()) for path in files}
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    dropped = 0
    for line in MAPS.read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path in paths:
            start, end = (int(address, 16) for address in addresses.split("-"))
            if libc.madvise(start, end - start, MADV_DONTNEED) == 0:
                dropped += end - start
    if hasattr(libc, "malloc_trim"):  # glibc has it, musl does not
        libc.malloc_trim(0)
    return dropped
