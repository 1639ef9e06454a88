"""Memory that an export leaves behind: checkpoint files that stay mapped, and freed memory that malloc keeps."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

MAPS = Path("/proc/self/maps")
MADV_DONTNEED = 4  # Linux, asm-generic/mman-common.h


def drop_pages(files: Iterable[Path]) -> int:
    """Give back the memory of every map of these files, and what malloc holds for the next allocation.

    Who still reads a tensor gets its bytes from the file again: nobody may have written to it, which is what
    TensorSource asks for. Needed because torch 2.13 keeps the weights of an exported module alive. Linux only;
    elsewhere nothing is done.

    Returns:
        bytes of address space that was given back.
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
    if hasattr(libc, "malloc_trim"):  # glibc; musl has none
        libc.malloc_trim(0)
    return dropped
